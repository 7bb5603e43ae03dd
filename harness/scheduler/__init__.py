"""Who runs in the next iteration: one file per scheduling policy."""
