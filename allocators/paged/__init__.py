"""PagedAttention's allocator: blocks on demand, found through block tables (SOSP '23, section 4)."""
