"""The pictures of a small group say what the policies did."""

from collections import Counter

from kvarena.experiments.ours.sharing_view import draw_story, paged, vattention


def shared(moment) -> int:
    """Units that more than one sequence holds."""
    return sum(count > 1 for count in Counter(u for units in moment.units.values() for u in units).values())


def test_blocks_share_the_whole_prompt_until_the_first_write() -> None:
    admitted, wrote, grew, forked, parted, ended = paged()
    assert shared(admitted) == 2
    assert admitted.copies == ()
    assert len(wrote.copies) == 2, "n - 1 copies of the partly filled block; the last writes in place"
    assert shared(wrote) == shared(grew) == 1
    assert forked.units["C"] == forked.units["A"]
    assert len(parted.copies) == 1
    assert parted.units["A"][:2] == parted.units["C"][:2]
    assert parted.units["A"][2] != parted.units["C"][2]
    assert ended.units == {}


def test_page_groups_share_what_lies_wholly_below_the_prompt() -> None:
    admitted, wrote, grew, forked, parted, ended = vattention()
    assert shared(admitted) == shared(wrote) == shared(grew) == 1
    assert admitted.copies == (), "the prompt is not written yet"
    assert len(wrote.copies) == 2
    assert forked.units["A"][:2] == forked.units["C"][:2], "a full page-group is shared by a fork"
    assert forked.units["A"][2] != forked.units["C"][2]
    assert len(parted.copies) == 1
    assert ended.units == {}


def test_the_picture_draws() -> None:
    assert len(draw_story().axes) == 2 * len(paged())
