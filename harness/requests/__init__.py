"""Requests, their prompts and groups, and the workloads they come from."""
