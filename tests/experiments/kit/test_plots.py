"""Colours of allocators that no figure has heard of."""

import itertools

import pandas as pd
import pytest

from kvarena.experiments.kit.looks import looks
from kvarena.experiments.kit.plots import COLOURS, colour_of, colours_of

NEW = [f"allocator-{number}" for number in range(40)]


@pytest.mark.parametrize("pair", [*itertools.combinations(["headroom", *NEW[:8]], 2), ("ab", "ba")])
def test_two_newcomers_differ_and_from_all_that_are_known(pair: tuple[str, str]) -> None:
    one, other = (colours_of(pair)[name] for name in pair)
    assert one != other
    assert not {one, other} & set(COLOURS.values())


def test_many_newcomers_have_as_many_colours_in_whatever_order_they_come() -> None:
    colours = colours_of([*NEW, "paged"])
    assert len({colours[name] for name in NEW}) == len(NEW)
    assert colours["paged"] == COLOURS["paged"]
    assert colours == colours_of(["paged", *reversed(NEW)])
    assert colours["allocator-3"] == colour_of("allocator-3", NEW)
    assert colour_of("headroom") == colours_of(["headroom", "paged"])["headroom"]


def test_no_two_lines_of_a_panel_look_alike() -> None:
    names = [f"{name}/{kernel}" for name in ("ab", "ba", "paged") for kernel in ("numba", "sdpa")]
    rows = [{"label": name, "allocator": name.partition("/")[0], "x": 1.0, "value": 1.0} for name in names]
    for allocators in (["ab", "ba", "paged"], ["paged"]):
        some = pd.DataFrame(rows).query("allocator in @allocators")
        named = some.assign(system=some.label, paper="kvarena", setup="here", quantity="q")
        found = looks(named)
        assert len({(look.colour, look.dash) for look in found.values()}) == len(found) == 2 * len(allocators)
        assert len({(look.colour, look.marker) for look in found.values()}) == len(found)
