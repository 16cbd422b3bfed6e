"""What a model costs and how long it takes: one clock, one way to count."""
