"""Tasks: how answers are judged, drawn and written. One file for each task."""
