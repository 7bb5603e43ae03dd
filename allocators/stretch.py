"""Arithmetic of a stretch: sequences that grow by one token a step, each taking a block whenever its last one is full.

A sequence with `slack` empty slots takes its first block in step slack + 1, and then one every `block_size` steps. So
a clock can jump over many steps and still know which blocks were taken, and when.
"""


def blocks_taken(slack: int, steps: int, block_size: int) -> int:
    """Blocks that a sequence takes in so many steps."""
    return max(0, -(-(steps - slack) // block_size))


def block_steps(slack: int, steps: int, block_size: int) -> int:
    """Over these steps, the sum of the blocks taken so far: what their memory has been held for."""
    taken = blocks_taken(slack, steps, block_size)
    return taken * (steps - slack) - block_size * taken * (taken - 1) // 2


def longest_stretch(slacks: list[int], block_size: int, blocks: int, limit: int) -> int:
    """Steps, `limit` at most, that these sequences can take with so many blocks."""
    if len(slacks) * -(-limit // block_size) <= blocks:
        return limit  # even if each took its first block at once
    # In any block_size steps every sequence takes exactly one block. What is left serves those that take theirs
    # first, and the next one after them ends the stretch.
    rounds, left = divmod(blocks, len(slacks))
    return min(limit, rounds * block_size + sorted(slacks)[left])
