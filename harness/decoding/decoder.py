"""Known tokens of every sequence, and the next ones, chosen from a step's scores as each request is decoded.

What is chosen depends on scores, seeds and positions, never on memory: a sequence that was preempted, swapped, forked
or moved goes on with the same tokens.
"""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from kvarena.harness.decoding.beam import first_generation, next_generation
from kvarena.harness.decoding.sampling import sample
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prompt import Source, answer_source, own_source, spans_of
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import StepPlan
from kvarena.harness.seeded import Floats


class Decoder:
    """Keeps tokens by seq_id, prompt and output, until a request has finished."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self._vocab_size = vocab_size
        self._seed = seed
        self._said: dict[int, list[int]] = {}  # prompt and output, where the trace has both (`requests/prompt.py`)
        self._totals: dict[int, Floats] = {}  # request_id -> accumulated log-probability of its beams
        self._sources: dict[int, tuple[int, ...]] = {}  # request_id -> which beam each one continues, since last asked

    def known(self, request: Request) -> list[int]:
        """Known tokens; a prompt is drawn from the seed and the request's id, so every system sees the same.

        What prompts share (a prefix, blocks of a trace, a conversation) has the same tokens in each of them.
        """
        if request.seq_id not in self.tokens:
            prompt = self._drawn(own_source(request), request.prompt_tokens)
            for source, start, end in spans_of(request):
                prompt[start:end] = self._drawn(source, end - start)
            self.tokens[request.seq_id] = prompt
        return self.tokens[request.seq_id]

    def _drawn(self, source: Source, count: int) -> list[int]:
        """The first tokens of a source."""
        generator = np.random.default_rng([self._seed, *source])
        drawn: list[int] = generator.integers(0, self._vocab_size, count).tolist()
        return drawn

    def deliver(self, plan: StepPlan, logits: Tensor) -> None:
        """Give every sequence whose last known token was fed its next one; a chunk of a prompt yields none.

        logits: [B, V], of decodes and then of prefills. All members of a group choose from the one row of their prompt.
        """
        yielding: dict[int, tuple[Request, list[int]]] = {}  # request_id -> one of its gang, its rows
        likeliest = logits.argmax(-1).tolist()
        for row, request in _yielding(plan):
            is_padding = request.generated >= request.output_tokens  # of a row that goes on to the end of its batch
            if request.decoding.name == "greedy" or is_padding:
                tokens = self.known(request)
                tokens.append(self._answer(request, len(tokens), likeliest[row]))
            else:
                yielding.setdefault(request.request_id, (request, []))[1].append(row)
        for request, rows in yielding.values():
            scores = logits[rows].float().cpu().numpy()  # [1 or n, V]
            (self._rank if request.decoding.is_beam else self._sample)(request.gang, scores)

    def survivors(self, group: Group) -> tuple[int, ...]:
        """For each beam of a group, the one that its last token continued."""
        return self._sources[group.first.seq_id]

    def finish(self, request: Request) -> None:
        """Forget a finished sequence."""
        for book in (self.tokens, self._said, self._totals, self._sources):
            book.pop(request.seq_id, None)

    def _answer(self, request: Request, position: int, likeliest: int) -> int:
        """The trace's token at a position, where it has one; else the likeliest."""
        source = answer_source(request)
        if source is None or position >= request.final_tokens:
            return likeliest
        if request.seq_id not in self._said:
            self._said[request.seq_id] = self._drawn(source, request.final_tokens)
        return self._said[request.seq_id][position]

    def _sample(self, gang: list[Request], scores: Floats) -> None:
        for member, request in enumerate(gang):
            tokens = self.known(request)
            mine = scores[min(member, len(scores) - 1)]
            tokens.append(sample(mine, request.decoding, request.request_id, member, len(tokens)))

    def _rank(self, gang: list[Request], scores: Floats) -> None:
        request_id = gang[0].request_id
        if request_id in self._totals:
            generation = next_generation(scores, self._totals[request_id])
        else:
            generation = first_generation(scores[0], len(gang))
        before = [self.known(beam) for beam in gang]
        for beam, source, token in zip(gang, generation.sources, generation.tokens, strict=True):
            self.tokens[beam.seq_id] = [*before[source], token]
        self._totals[request_id], self._sources[request_id] = generation.totals, generation.sources


def _yielding(plan: StepPlan) -> Iterable[tuple[int, Request]]:
    """Rows of the logits that yield a token, and whose they are."""
    yield from enumerate(plan.decodes)
    for row, chunk in enumerate(plan.prefills, start=len(plan.decodes)):
        if chunk.is_last:
            yield row, chunk.request
