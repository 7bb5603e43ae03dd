"""Sequences that are resident from the start: what a measurement of a fixed batch begins with."""

from collections.abc import Sequence as Seq

from kvarena.allocators.policy import Action, Admission, Policy, Sequence
from kvarena.allocators.sizes import format_bytes
from kvarena.errors import UserError


def make_resident(policy: Policy, seqs: Seq[Sequence]) -> list[Action]:
    """Give sequences memory for their prompts, as the step before the first would have left it.

    That step has looked ahead: whoever outgrows in the first step what the prompt took has memory already. Returns the
    actions to perform before it. Raises UserError where the pool does not hold all of them.
    """
    for count, seq in enumerate(seqs):
        if policy.admit(Admission([seq], seq.prompt_tokens)) is None:
            needed = sum(policy.kv_layout.resident_bytes(seq.prompt_tokens) for seq in seqs)
            raise UserError(
                f"a batch of {len(seqs)} does not fit {policy.name}'s pool of {format_bytes(policy.pool_bytes)}: the "
                f"K/V of its prompts takes {format_bytes(needed)}; {count} sequences fit. Lower params.batch_sizes or "
                "raise params.pool_bytes"
            )
    return [*policy.drain(), *policy.look_ahead()]
