"""Which block sizes there are."""

from kvarena.errors import UserError

MAX_BLOCK_SIZE = 256  # tokens; the largest of PagedAttention's Fig 18


def checked_block_size(block_size: int) -> int:
    """`block_size` itself. Raises UserError where it is not in 1 .. 256 tokens."""
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise UserError(f"allocator.block_size: {block_size} is not in 1 .. {MAX_BLOCK_SIZE} tokens")
    return block_size
