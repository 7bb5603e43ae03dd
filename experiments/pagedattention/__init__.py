"""Experiments that reproduce the figures and tables of PagedAttention (SOSP '23)."""
