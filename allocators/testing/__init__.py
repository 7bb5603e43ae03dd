"""What every policy and store is held to, for tests of one's own."""
