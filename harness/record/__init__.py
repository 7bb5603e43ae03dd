"""What a run leaves: frames, summaries, provenance, and the statistics in them."""
