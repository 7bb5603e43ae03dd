"""Traces, scheduling, execution, clocks, metrics and records."""
