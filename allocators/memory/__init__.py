"""Bytes: stores, and what they share whatever the policy."""
