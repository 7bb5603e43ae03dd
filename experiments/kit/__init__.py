"""What experiments share: replays, curves, looks and tables."""
