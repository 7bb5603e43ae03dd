"""The sequences of one request that share its prompt: its samples, or its beams (PagedAttention section 4.4).

    request   prompt ............|   written once, through the first member
    member 0                     | its own tokens
    member 1                     | its own tokens
    member 2                     | its own tokens

Members run in lockstep: admitted, preempted and swapped together, all or none (section 4.5); every step gives each a
token, and all end at the trace's output length. So they have the same length in every step.
"""

from dataclasses import dataclass

from kvarena.harness.requests.request import Request


@dataclass(slots=True, eq=False)
class Group:
    """At least two requests of consecutive seq_ids and one arrival. `first` stands for them all in the line."""

    members: list[Request]
    ranked: int = 1  # beams: tokens of each member up to which it is settled who lives on; the first needs no ranking

    def __post_init__(self) -> None:
        for member in self.members:
            member.group = self

    @property
    def first(self) -> Request:
        """The member through which the prompt is written."""
        return self.members[0]

    @property
    def seq_ids(self) -> list[int]:
        """Ids of the members, in order."""
        return [member.seq_id for member in self.members]

    @property
    def needs_ranking(self) -> bool:
        """Whether beams have got a token by which some of them may die."""
        first = self.first
        return first.decoding.is_beam and self.ranked < first.generated < first.output_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether every member's next step is a decode."""
        return all([member.is_decoding for member in self.members])
