"""The requests of a replay, fresh from a workload: a replay writes into them."""

from collections.abc import Sequence

from kvarena.errors import UserError
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.prompt import Span, block_spans, conversation_span
from kvarena.harness.requests.request import Request
from kvarena.harness.requests.workload import Workload


def make_requests(
    workload: Workload, decodings: Sequence[DecodingConfig], prefix: Prefix | None = None
) -> list[Request]:
    """One for each sequence, in order of arrival; those of one request have consecutive ids and are a group.

    All prompts begin with `prefix`. Raises UserError for one that does not reach past it.
    """
    if prefix is not None and len(workload):
        prefix.check(int(workload.prompt_tokens.min()))
    columns = (workload.prompt_tokens, workload.output_tokens, workload.arrival_ps)
    rows = zip(*(column.tolist() for column in columns), decodings, spans_of_prompts(workload), strict=True)
    requests: list[Request] = []
    for prompt, output, at, decoding, spans in rows:
        first = len(requests)
        gang = [
            Request(first + i, prompt, output, arrival_ps=at, decoding=decoding, prefix=prefix, spans=spans)
            for i in range(decoding.n)
        ]
        if len(gang) > 1:
            Group(gang)
        requests += gang
    return requests


def spans_of_prompts(workload: Workload) -> list[tuple[Span, ...]]:
    """What is known of each prompt that others have too: the blocks of a trace that names them, or a conversation so
    far, unless histories are cut: then each turn begins somewhere else.
    """
    prompts = workload.prompt_tokens.tolist()
    if workload.hash_ids is not None:
        return [block_spans(ids, workload.block_tokens, n) for ids, n in zip(workload.hash_ids, prompts, strict=True)]
    is_cut = workload.provenance.get("trace", {}).get("cut_prompt") is not None
    if workload.conversation_ids is None or is_cut:
        return [()] * len(prompts)
    return [conversation_span(each, n) for each, n in zip(workload.conversation_ids.tolist(), prompts, strict=True)]


def check_width(decodings: Sequence[DecodingConfig], vocab_size: int) -> None:
    """Raises UserError for a beam that needs more first tokens than there are."""
    widest = max((decoding.n for decoding in decodings if decoding.is_beam), default=0)
    if widest > vocab_size:
        raise UserError(
            f"decoding.n={widest}: a beam cannot be wider than the model's vocabulary of {vocab_size} tokens"
        )
