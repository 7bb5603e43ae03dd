"""vAttention's allocator: page-groups mapped on demand into contiguous virtual rows (ASPLOS '25)."""
