"""KV-cache allocators: policies (who owns which memory) and stores (the bytes)."""
