"""Pictures of memory as sequences share it: blocks through block tables, page-groups through page maps.

Both policies play one piece, for three sequences A, B, C of one request with a prompt of 7 tokens, in units of 4:
admission, the first write, a second unit, the death of one beam whose place goes on from another, and the end.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvarena.allocators.actions import Action, CopyBlock, CopyRow, Map, Unmap
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission, Policy, Sequence
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.experiments.kit import plots

UNIT_TOKENS = 4
NUM_UNITS = 8
LAYOUT = attention_layout(num_layers=1, num_kv_heads=64, head_size=128)  # 4 tokens of K, or V, take 64 KB
NAMES = "ABC"


class Moment(NamedTuple):
    """The units of each sequence, in the order of its positions, and what had to be copied to come here."""

    title: str
    units: dict[str, tuple[int, ...]]
    copies: tuple[tuple[int, int], ...]  # (source, target)


def paged() -> list[Moment]:
    """The piece in blocks; a unit is a block."""
    pool_bytes = NUM_UNITS * UNIT_TOKENS * LAYOUT.token_bytes
    policy = PagedPolicy(PagedConfig(block_size=UNIT_TOKENS, watermark=0), LAYOUT, pool_bytes, max_tokens=64)
    return list(_play(policy, lambda seq_id: policy.block_table(seq_id), _Blocks()))


def vattention() -> list[Moment]:
    """The piece in rows; a unit is a page-group in every tensor."""
    pool_bytes = NUM_UNITS * UNIT_TOKENS * LAYOUT.token_bytes
    policy = VAttentionPolicy(
        VAttentionConfig(
            page_group="64KB", watermark=0, max_rows=len(NAMES), eager_allocation=False, deferred_reclamation=False
        ),
        LAYOUT,
        pool_bytes,
        max_tokens=64,
    )
    rows = _Rows(policy.geometries[0].page_group)
    return list(_play(policy, lambda seq_id: rows.mapped.get(policy.row(seq_id), []), rows))


class _Blocks:
    def copies(self, actions: Iterable[Action]) -> Iterator[tuple[int, int]]:
        """Blocks that are copied."""
        yield from ((a.source, a.target) for a in actions if isinstance(a, CopyBlock))


class _Rows:
    """What is mapped in each row, followed from the actions."""

    def __init__(self, page_group: int) -> None:
        self.mapped: dict[int, list[int]] = {}
        self._page_group = page_group

    def copies(self, actions: Iterable[Action]) -> Iterator[tuple[int, int]]:
        """Page-groups of which a part is copied; maps and unmaps are followed on the way."""
        for action in actions:
            if isinstance(action, Map):
                self.mapped.setdefault(action.row, []).append(action.page_group)
            elif isinstance(action, Unmap):
                self.mapped[action.row].pop()
            elif isinstance(action, CopyRow):
                at = action.start // self._page_group
                yield self.mapped[action.source][at], self.mapped[action.target][at]


def _play(policy: Policy, units_of: Callable[[int], Iterable[int]], reader: _Blocks | _Rows) -> Iterator[Moment]:
    sharing = policy.sharing
    assert sharing is not None
    seqs = [Sequence(i, 7, 9) for i in range(len(NAMES))]
    ids = [seq.seq_id for seq in seqs]

    def moment(title: str, resident: Iterable[int] = ids) -> Moment:
        copies = tuple(reader.copies([*policy.drain(), *policy.look_ahead()]))
        policy.check_integrity()
        return Moment(title, {NAMES[i]: tuple(units_of(i)) for i in resident}, copies)

    policy.admit(Admission(seqs, 7))
    yield moment("prompt of 7 tokens, admitted for A, B and C")
    sharing.grow_gang(ids)
    yield moment("each writes its first token: copied first")
    sharing.grow_gang(ids)
    yield moment("the next: a second unit of its own for each")
    policy.release(2)
    sharing.fork(0, Sequence(2, 7, 9))
    yield moment("C dies; its place goes on from A (fork)")
    sharing.grow_gang(ids)
    yield moment("each writes again: A and C must part")
    for seq_id in ids:
        policy.release(seq_id)
    yield moment("all have ended", ())


COLOURS = {0: "#EEEEEE", 1: "#9ECAE1", 2: "#FDAE6B", 3: "#E6550D"}  # by the number of sequences that hold a unit


def draw_story() -> Figure:
    """Both pieces side by side, a row for each moment; colours count holders, arrows are copies."""
    stories = {"PagedAttention: blocks of 4 tokens": paged(), "vAttention: page-groups of 4 tokens": vattention()}
    figure, axes = plots.canvas(len(next(iter(stories.values()))), len(stories), width=5.6, height=1.25)
    for column, (title, moments) in enumerate(stories.items()):
        for number, each in enumerate(moments):
            axis = axes[number * len(stories) + column]
            _pool(axis, each)
            axis.set_title(f"{title}\n{each.title}" if number == 0 else each.title, fontsize=8, loc="left")
    figure.tight_layout()
    return figure


def _pool(axis: Axes, moment: Moment) -> None:
    """The physical units in a line; a unit that sequence A holds as its second is labelled A1."""
    holders: dict[int, list[str]] = {}
    for name, units in moment.units.items():
        for place, unit in enumerate(units):
            holders.setdefault(unit, []).append(f"{name}{place}")
    for unit in range(NUM_UNITS):
        held = holders.get(unit, [])
        axis.add_patch(Rectangle((unit, 0), 0.94, 1, color=COLOURS[len(held)]))
        axis.text(unit + 0.47, 0.5, "\n".join(held) or "free", ha="center", va="center", fontsize=7)
        axis.text(unit + 0.47, -0.22, str(unit), ha="center", va="center", fontsize=6, color="#666666")
    for source, target in moment.copies:
        bow = -0.35 if target > source else 0.35  # above the units, whichever way it points
        arrow = {"arrowstyle": "->", "color": "#D62728", "connectionstyle": f"arc3,rad={bow}"}
        axis.annotate("", (target + 0.47, 1.02), (source + 0.47, 1.02), arrowprops=arrow)
    axis.set(xlim=(0, NUM_UNITS), ylim=(-0.35, 1.55))
    axis.axis("off")
