"""Whole models: what every kind of model does, and one file for each kind."""
