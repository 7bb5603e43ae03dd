"""Tables on a terminal: nothing in them is markup, and no name is cut."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cells = Mapping[tuple[str, str], str]  # (line, head) -> what stands there
Justify = Literal["left", "right"]
_ANY = 10_000  # columns: a width that no table needs


def print_grid(
    console: Console,
    title: str,
    corner: str,
    lines: Sequence[str],
    heads: Sequence[str],
    cells: Cells,
    justify: Justify = "right",
) -> None:
    """Print a grid: as it is where that fits without a break in a word, else turned, else in parts side by side."""
    turned = {(head, line): cell for (line, head), cell in cells.items()}
    ways = (
        [_grid(title, corner, lines, heads, cells, justify)],
        [_grid(title, "", heads, lines, turned, justify)],
        *([_grid(title, corner, lines, part, cells, justify) for part in parts] for parts in _parts(heads)),
    )
    fitting = (way for way in ways if all(_needs(console, each) <= console.width for each in way))
    for each in next(fitting, ways[-1]):
        console.print(each)


def _parts(heads: Sequence[str]) -> Iterator[list[Sequence[str]]]:
    """The heads in ever more parts of equal size."""
    for size in range(len(heads) - 1, 0, -1):
        yield [heads[start : start + size] for start in range(0, len(heads), size)]


def _needs(console: Console, table: Table) -> int:
    """Columns of the terminal, where lines break between words alone."""
    return Measurement.get(console, console.options.update(width=_ANY), table).minimum


def _grid(
    title: str, corner: str, lines: Sequence[str], heads: Sequence[str], cells: Cells, justify: Justify
) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(Text(corner), overflow="fold", min_width=max(map(len, lines), default=0))
    for head in heads:
        table.add_column(Text(head), justify=justify, overflow="fold")
    for line in lines:
        table.add_row(Text(line), *(Text(cells.get((line, head), "-")) for head in heads))
    return table
