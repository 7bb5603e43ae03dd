"""Tables on a terminal: nothing in them is markup, and no name is cut."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cells = Mapping[tuple[str, str], str]  # (line, head) -> what stands there
Justify = Literal["left", "right"]


class Grid(NamedTuple):
    """Lines and heads, and the cells where they meet; `corner` heads the names of the lines."""

    corner: str
    lines: Sequence[str]
    heads: Sequence[str]
    cells: Cells

    def turned(self) -> "Grid":
        """The grid with its heads as lines."""
        return Grid("", self.heads, self.lines, {(head, line): cell for (line, head), cell in self.cells.items()})

    def parts(self) -> Iterator[list["Grid"]]:
        """The grid as ever more grids of fewer heads."""
        for size in range(len(self.heads) - 1, 0, -1):
            starts = range(0, len(self.heads), size)
            yield [self._replace(heads=self.heads[start : start + size]) for start in starts]

    def columns(self) -> list[list[str]]:
        """The texts of every column, its head first."""
        names = [self.corner, *self.lines]
        return [names, *([head, *(self.cells.get((line, head), "-") for line in self.lines)] for head in self.heads)]


def print_grid(console: Console, title: str, grid: Grid, justify: Justify = "right") -> None:
    """Print a grid: as it is where that fits, else turned, else in parts side by side.

    Texts break between words; within one only where nothing else is left.
    """
    ways = ([grid], [grid.turned()], *grid.parts())
    for way, whole in (*((way, True) for way in ways[:2]), *((way, False) for way in ways)):
        widths = [_widths(part.columns(), console.width, whole) for part in way]
        if all(widths):
            break
    console.print(Text(title, style="italic"))
    for part, width in zip(way, widths, strict=True):
        console.print(_table(part, width, justify))


def _widths(columns: Sequence[Sequence[str]], room: int, whole: bool) -> list[int]:
    """The width of each column; none where words would break. whole: names of lines do not break at all."""
    least = [max(cell_len(word) for text in column for word in (text.split() or [""])) for column in columns]
    wished = [max(map(cell_len, column)) for column in columns]
    if whole:
        least[0] = wished[0]
    left = room - sum(least) - 3 * len(columns) - 1  # a border and a blank at either side
    if left < 0:
        return []
    for number, (few, many) in enumerate(zip(least, wished, strict=True)):
        more = min(left, many - few)
        least[number], left = few + more, left - more
    return least


def _table(grid: Grid, widths: Sequence[int], justify: Justify) -> Table:
    table = Table()
    names, *others = grid.columns()
    for number, column in enumerate((names, *others)):
        at = justify if number else "left"
        table.add_column(Text(column[0]), justify=at, overflow="fold", width=widths[number] if widths else None)
    for texts in zip(names[1:], *(column[1:] for column in others), strict=True):
        table.add_row(*map(Text, texts))
    return table
