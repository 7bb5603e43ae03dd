"""What the steps do: each module has the functions that `plan.py` names."""
