"""The arithmetic of a stretch equals walking it."""

from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.paged.steps_until_growth import growth, longest_stretch

BLOCK_SIZES = st.integers(1, 20)


def walk(slack, steps, block_size):
    """Blocks taken after each step."""
    taken, held = 0, []
    for _ in range(steps):
        if slack == 0:
            taken, slack = taken + 1, block_size
        slack -= 1
        held.append(taken)
    return held


@given(block_size=BLOCK_SIZES, slack=st.integers(0, 40), steps=st.integers(1, 100))
def test_blocks_and_their_steps(block_size, slack, steps):
    held = walk(slack, steps, block_size)
    assert growth(max(0, steps - slack), block_size) == (held[-1], sum(held))


@given(block_size=BLOCK_SIZES, data=st.data(), blocks=st.integers(0, 60))
def test_the_longest_stretch_is_the_longest(block_size, data, blocks):
    slacks = data.draw(st.lists(st.integers(0, block_size - 1), min_size=1, max_size=12))
    steps = longest_stretch(slacks, blocks, block_size)

    def needed(steps):
        return sum(growth(max(0, steps - slack), block_size)[0] for slack in slacks)

    assert needed(steps) <= blocks < needed(steps + 1)
