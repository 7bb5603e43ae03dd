"""Experiments that reproduce the figures and tables of vAttention (ASPLOS '25)."""
