"""Limits of options: a UserError says which option, and what is allowed."""

from kvarena.errors import UserError

MAX_BLOCK_SIZE = 256  # tokens; the largest of PagedAttention's Fig 18


def check_block_size(tokens: int) -> None:
    """Raises UserError where `block_size` is not in 1 .. 256 tokens."""
    if not 1 <= tokens <= MAX_BLOCK_SIZE:
        raise UserError(f"allocator.block_size: {tokens} is not in 1 .. {MAX_BLOCK_SIZE} tokens")


def check_shares(**shares: float) -> None:
    """Raises UserError for an option that is no share in [0, 1)."""
    for option, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"allocator.{option}: {share} is not in [0, 1)")


def check_counts(**counts: int) -> None:
    """Raises UserError for an option that is not at least 1."""
    for option, count in counts.items():
        if count < 1:
            raise UserError(f"allocator.{option}: {count} is not at least 1")
