"""The serving loop, its clock and its log."""
