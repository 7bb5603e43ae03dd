"""Static reservation: Orca's three, FasterTransformer, and reservations in whole rows."""
