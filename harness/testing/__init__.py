"""What every scheduler and replay is held to, for tests of one's own."""
