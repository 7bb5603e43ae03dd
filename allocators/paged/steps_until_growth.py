"""Arithmetic of a stretch: sequences that grow by one token a step, each taking a block whenever its last one is full.

A sequence with `slack` empty slots takes its first block in step slack + 1, and then one every `block_size` steps. So
a clock can jump over many steps and still know which blocks were taken, and when.
"""


def growth(missing: int, block_size: int) -> tuple[int, int]:
    """Blocks that a sequence takes for its last `missing` steps, and the sum over these steps of those taken so far."""
    taken = -(-missing // block_size)
    return taken, taken * missing - block_size * (taken * (taken - 1) // 2)


def longest_stretch(slacks: list[int], blocks: int, block_size: int) -> int:
    """Steps that these sequences, one or more, can take together with so many blocks."""
    # In any block_size steps every sequence takes exactly one block. The blocks left over serve those that take
    # theirs first, and the next one after them ends the stretch.
    rounds, left = divmod(blocks, len(slacks))
    return rounds * block_size + sorted(slacks)[left]
