"""Attention that torch brings."""
