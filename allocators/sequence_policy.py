"""What every allocation policy does: memory for sequences, one by one. `policy.py` adds what only some can do.

A sequence is admitted, grows, and is released:

    fits_pool?  can_admit?  admit      can_grow?  grow  grow  grow ...      release
    |-------- waiting -----|---------------------- resident --------------------|

After each step's decisions `look_ahead` plans for the next one, and `drain` hands over what must happen to real memory
(`actions.py`). Nine methods are abstract; the others have answers that are always safe.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.actions import Action
from kvarena.allocators.holding import Holding, Units
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.usage import Usage
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.kernels.layout import Layout


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence as a policy sees it. `output_tokens` is the true output, known in a replay."""

    seq_id: int
    prompt_tokens: int
    output_tokens: int

    @property
    def final_tokens(self) -> int:
        """Length at its end: prompt + true output."""
        return self.prompt_tokens + self.output_tokens


class IntegrityError(AssertionError):
    """A policy's books do not add up; the message shows the sum that fails. Always a bug of ours."""


class NotResidentError(KeyError):
    """A sequence was named that owns no memory: it was released already, or never admitted. A bug of the caller."""

    def __init__(self, seq_id: int) -> None:
        super().__init__(seq_id)
        self.seq_id = seq_id

    def __str__(self) -> str:
        return f"sequence {self.seq_id} is not resident: it was released or swapped out, or never admitted"


class SequencePolicy(ABC):
    """Who owns which bytes of one pool, where sequences share nothing.

    Running out is an answer (False), not an exception; a False leaves the policy as it was. A `seq_id` that is not
    resident, or is admitted twice, is a bug of the caller and raises KeyError or ValueError.
    """

    name: str
    memory_layout: Layout
    pads: bool = False  # whether rows go on past their own end, to that of a batch
    kv_layout: KVLayout
    pool_bytes: int

    # What others must know to price its actions and to make its store. A policy that decides an action has said how
    # large it is: CopyBlock, SwapOut and SwapIn move a block, Map and Unmap a page-group in every tensor of a group.
    block_size: int | None = None  # tokens; None where nothing lies in blocks
    geometries: tuple[RowGeometry, ...] = ()  # of rows that are mapped page-group by page-group, by layer group

    @property
    def block_bytes(self) -> int | None:
        """Bytes of a block over all tensors."""
        return None if self.block_size is None else self.block_size * self.kv_layout.token_bytes

    @abstractmethod
    def fits_pool(self, seq: Sequence) -> bool:
        """Whether the sequence could ever run to its end, alone in an empty pool."""

    @abstractmethod
    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether `admit` would succeed now."""

    @abstractmethod
    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence memory for its first `tokens` positions (a prompt, or one to be recomputed)."""

    @abstractmethod
    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether `grow` would succeed now."""

    @abstractmethod
    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Give the sequence memory for `tokens` more positions. Many at once are legal."""

    @abstractmethod
    def release(self, seq_id: int) -> None:
        """Take back all that the sequence owns."""

    @abstractmethod
    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""

    @abstractmethod
    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte of the pool in one leaf; `head` is the request that waits at the head of the line."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Recount everything from scratch. Raises IntegrityError with the sum that does not add up."""

    # ---- what a sequence holds, for pictures ---------------------------------------------------------------------

    @property
    def units(self) -> Units | None:
        """The units of the pool; None where its memory cannot be told apart by sequence."""
        return None

    def holding(self, seq: Sequence) -> Holding:
        """What a resident sequence holds, where there are `units`."""
        raise NotImplementedError(f"{self.name}'s memory cannot be told apart by sequence")

    def idle_units(self) -> tuple[int, ...]:
        """Units that are kept ready and belong to nobody."""
        return ()

    # ---- what happens to real memory, once a step ---------------------------------------------------------------

    def look_ahead(self) -> list[Action]:
        """Plan, after scheduling, what the next iteration will need: actions for the background."""
        return []

    def drain(self) -> list[Action]:
        """Hand over, once, the actions decided since the last call: they precede this step's forward pass."""
        return []

    # ---- a step of a batch: a position more for each sequence ---------------------------------------------------

    @property
    def free_units(self) -> int | None:
        """Units (blocks) that any sequence may still take; None where growth does not draw on such a count."""
        return None

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """Give each of these sequences one more position, in this order, up to the first that finds no memory.

        Returns how many have got theirs. Where `free_units` counts units, a sequence is given nothing unless one is
        free, even if it needs none (vLLM's rule, PagedAttention's artifact).
        """
        for count, seq_id in enumerate(seq_ids):
            if self.free_units == 0 or not self.grow(seq_id):
                return count
        return len(seq_ids)

    # ---- many steps at once: the modelled clock jumps over those in which nothing is decided --------------------

    def tokens_until_growth(self, seq_id: int) -> int:
        """How many more positions fit into what the sequence owns already. 0 is always a safe answer."""
        return 0

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """How many decode steps in a row, `limit` at most, these sequences can surely take with nothing to decide.

        In each of them every sequence grows by one position and finds memory, at least `margin` units stay free where
        `free_units` counts them (a gang asks for one for each of its sequences), and there is no action to perform,
        except that `look_ahead` may map, `ahead` times a step at most. The answer may be too small, never too large.
        The caller's limit lets no sequence pass its final length (only rows of a padded batch may).
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
