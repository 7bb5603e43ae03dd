"""A run from its configuration: systems, schemas, what is read, and what its rows may be called."""
