"""The contract of an allocation policy: who owns which slot, block or page-group. Pure bookkeeping, no bytes.

A policy is deterministic and imports no torch: the same object decides in a measured and in a modelled run. What has
to be done to real memory it says as *actions* (`actions.py`), which a store performs or a device model prices.

    refusal?  can_admit?  admit         grow  grow  grow ...         release
    |------- waiting ----------|-------------- resident ----------------|

Eight methods are abstract; the others have answers that are always safe. What only some policies can do are three
capabilities, at the end of this file: a policy has an object for each, or None.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvarena.allocators.actions import Action, CopyBlock, CopyRow, Map, SwapIn, SwapOut, Unmap
from kvarena.allocators.holding import Holdings
from kvarena.allocators.integrity import IntegrityError
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.usage import Usage
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.kernels.layout import Layout

__all__ = ["Action", "Admission", "CopyBlock", "CopyRow", "IntegrityError", "Map", "NotResidentError", "Policy",
           "PrefixCache", "Sequence", "Sharing", "SwapIn", "SwapOut", "Swapping", "Unmap"]  # fmt: skip


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence as a policy sees it. `output_tokens` is the true output, known in a replay."""

    seq_id: int
    prompt_tokens: int
    output_tokens: int
    final_tokens: int = field(init=False)  # length at its end: prompt + true output

    def __post_init__(self) -> None:
        self.final_tokens = self.prompt_tokens + self.output_tokens


class Admission(NamedTuple):
    """Who asks for memory, and for how much. A sequence alone is a gang of one; a policy that shares sees no others.

    The prompt of a gang is written once, through its first member.
    """

    gang: Seq[Sequence]  # of one request, as long as one another: all of them are admitted, or none
    tokens: int  # first positions that each is given: a prompt's, or all that is to be computed again
    own: int = 0  # positions beyond them that each member of a preempted gang grows by in a later step
    prefix: int | None = None  # id of the kept prefix that holds the first positions
    names: Seq[Hashable] = ()  # of the prompt's leading units, as a prefix cache knows them


class NotResidentError(KeyError):
    """A sequence was named that owns no memory: it was released already, or never admitted. A bug of the caller."""

    def __init__(self, seq_id: int) -> None:
        super().__init__(seq_id)
        self.seq_id = seq_id

    def __str__(self) -> str:
        return f"sequence {self.seq_id} is not resident: it was released or swapped out, or never admitted"


class Policy(ABC):
    """Who owns which bytes of one pool.

    Running out is an answer (None or False), not an exception, and leaves the policy as it was. A `seq_id` that is not
    resident, or is admitted twice, is a bug of the caller and raises KeyError or ValueError.
    """

    name: str
    memory_layout: Layout
    pads: bool = False  # whether rows go on past their own end, to that of a batch
    kv_layout: KVLayout
    pool_bytes: int

    # What a policy's actions move: its store is made and its actions are priced from this.
    block_size: int | None = None  # tokens of a block, which CopyBlock, SwapOut and SwapIn move
    geometries: tuple[RowGeometry, ...] = ()  # by layer group, of rows whose page-groups Map and Unmap move

    # What it can do besides.
    sharing: "Sharing | None" = None
    cache: "PrefixCache | None" = None
    swapping: "Swapping | None" = None

    # ---- the life of a sequence --------------------------------------------------------------------------------

    @abstractmethod
    def refusal(self, admission: Admission) -> str:
        """Why a gang could never run to its end, alone beside the kept prefixes; empty where it could.

        Its members drift apart. `tokens`, `own` and `names` do not matter.
        """

    @abstractmethod
    def can_admit(self, admission: Admission) -> bool:
        """Whether `admit` would succeed now, and the gang find memory for what its members had of their `own`.

        The latter may turn out too early: then it is preempted again. To a gang alone in the pool the answer is yes.
        """

    @abstractmethod
    def admit(self, admission: Admission) -> int | None:
        """Give each member of a gang memory for its first `tokens` positions: all of them, or none (None).

        Returns how many leading positions hold their K/V already: a kept prefix's, or what was found in the cache.
        """

    @abstractmethod
    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Give the sequence memory for `tokens` more positions. Many at once are legal."""

    @abstractmethod
    def release(self, seq_id: int) -> None:
        """Take back all that the sequence owns."""

    @abstractmethod
    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""

    def _never_fits(self, admission: Admission) -> str:
        """What to refuse with: the pool is too small."""
        times = f"{len(admission.gang)} x " if len(admission.gang) > 1 else ""
        tokens = admission.gang[0].final_tokens
        return f"{times}{tokens} tokens can never fit {self.name}'s pool of {self.pool_bytes} bytes"

    # ---- once a step -------------------------------------------------------------------------------------------

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """Give each of these sequences one more position, in this order, up to the first that finds no memory.

        Returns how many have got theirs. (Blocks follow vLLM: nobody grows unless one is free, even if it needs none.)
        """
        for count, seq_id in enumerate(seq_ids):
            if not self.grow(seq_id):
                return count
        return len(seq_ids)

    def drain(self) -> list[Action]:
        """Hand over, once, the actions decided since the last call: they precede this step's forward pass."""
        return []

    def look_ahead(self) -> list[Action]:
        """Plan, after scheduling, what the next iteration will need: actions for the background."""
        return []

    # ---- many steps at once: the modelled clock jumps over those in which nothing is decided --------------------

    def tokens_until_growth(self, seq_id: int) -> int:
        """How many more positions fit into what the sequence owns already. 0 is always a safe answer."""
        return 0

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """How many decode steps in a row, `limit` at most, these sequences can surely take with nothing to decide.

        In each of them every sequence grows by one position and finds memory, `margin` free blocks stay where there
        are blocks (a gang asks for one for each of its sequences), and there is no action to perform, except that
        `look_ahead` may map, `ahead` times a step at most. The answer may be too small, never too large. The caller's
        limit lets no sequence pass its final length (only rows of a padded batch may).
        """
        if self.kv_layout.has_windows:
            return 0  # leaves of a ring that fills up do not change evenly
        return min([limit, *map(self.tokens_until_growth, seq_ids)])

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by one position, `steps` times over; the sum of `usage(head)` over these steps.

        For quiet steps only; what they map in the background is handed over by the next `look_ahead`. Here no
        sequence takes a new unit, so every leaf changes by the same amount each step.
        """
        before = self.usage(head)
        for seq_id in seq_ids:
            self.grow(seq_id, steps)
        after = self.usage(head)
        return Usage(*[steps * a + (b - a) * (steps + 1) // 2 for a, b in zip(before, after, strict=True)])

    # ---- the books ---------------------------------------------------------------------------------------------

    @abstractmethod
    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte of the pool in one leaf; `head` is the request that waits at the head of the line."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Recount everything from scratch. Raises IntegrityError with the sum that does not add up."""

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings | None:
        """What resident sequences hold, for pictures; None where memory cannot be told apart by sequence."""
        return None


class Sharing(Protocol):
    """What a policy can do with several sequences at once: gangs, beams, and prefixes that are kept.

    Where members cannot hold the same memory, the others get copies of the prompt, due as soon as one of them grows
    (or the first is released), by when it has been written.
    """

    @property
    def shared_bytes(self) -> int:
        """What sharing saves: bytes that would be attached in addition if every sequence held its own."""

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """Give each of these sequences one more position: all of them, or none (and nothing has changed)."""

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence, all of whose positions have been written (beam search).

        False where memory lacks, and nothing has changed. Raises NotResidentError where the parent is not resident.
        """

    def reseat(self, moves: Seq[tuple[int, Sequence]]) -> bool:
        """Make resident sequences copies of others, (parent, child) each; what the children held goes (beam search).

        No child is a parent. False where memory lacks for a child; its sequences are to be given up then.
        """

    def keep_prefix(self, prefix_id: int, tokens: int) -> None:
        """Keep memory for a prefix that requests begin with (section 4.4), resident as `prefix_id` until released.

        The caller writes it once. Raises UserError where it finds no room.
        """


class PrefixCache(Protocol):
    """K/V that is found again by what it holds.

    `names` are hashes of the leading units of a prompt, each of which stands for all up to its end
    (`paged/prefix_cache.py`).
    """

    @property
    def unit_tokens(self) -> int:
        """Tokens that one name stands for beyond the name before it."""

    def found_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """How many leading tokens of a prompt of `tokens` would be found now; at most all but one."""

    def keep(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let what the sequence has written be found from now on, as far as there are names."""


class Swapping(Protocol):
    """A CPU pool that a gang moves to when it is preempted (PagedAttention section 4.5). Copies come out of `drain`."""

    num_blocks: int  # of the CPU pool

    def can_swap_out(self, seq_ids: Seq[int]) -> bool:
        """Whether the CPU pool has room for all that these sequences own."""

    def swap_out(self, seq_ids: Seq[int]) -> None:
        """Move a gang to the CPU pool, what its members share once; none is resident any more."""

    def can_swap_in(self, seq_ids: Seq[int]) -> bool:
        """Whether the gang fits back, one position more for each included, with the watermark left."""

    def swap_in(self, seq_ids: Seq[int]) -> None:
        """Move a gang back from the CPU pool; what its members shared they share again."""
