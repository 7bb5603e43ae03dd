"""The measured clock: the model runs, and time is the wall's."""
