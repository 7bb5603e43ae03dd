"""The requests of a replay, fresh from a workload: a replay writes into them."""

from collections.abc import Sequence

from kvarena.errors import UserError
from kvarena.harness.decoding.config import DecodingConfig
from kvarena.harness.group import Group
from kvarena.harness.prefix import Prefix
from kvarena.harness.request import Request
from kvarena.harness.workload import Workload


def make_requests(
    workload: Workload, decodings: Sequence[DecodingConfig], prefix: Prefix | None = None
) -> list[Request]:
    """One for each sequence, in order of arrival; those of one request have consecutive ids and are a group.

    All prompts begin with `prefix`. Raises UserError for one that does not reach past it.
    """
    if prefix is not None and len(workload):
        prefix.check(int(workload.prompt_tokens.min()))
    columns = (workload.prompt_tokens, workload.output_tokens, workload.arrival_ps)
    rows = zip(*(column.tolist() for column in columns), decodings, strict=True)
    requests: list[Request] = []
    for prompt, output, at, decoding in rows:
        first = len(requests)
        gang = [
            Request(first + i, prompt, output, arrival_ps=at, decoding=decoding, prefix=prefix)
            for i in range(decoding.n)
        ]
        if len(gang) > 1:
            Group(gang)
        requests += gang
    return requests


def check_width(decodings: Sequence[DecodingConfig], vocab_size: int) -> None:
    """Raises UserError for a beam that needs more first tokens than there are."""
    widest = max((decoding.n for decoding in decodings if decoding.is_beam), default=0)
    if widest > vocab_size:
        raise UserError(
            f"decoding.n={widest}: a beam cannot be wider than the model's vocabulary of {vocab_size} tokens"
        )
