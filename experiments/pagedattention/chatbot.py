"""A chatbot (PagedAttention Fig 17): prompts are histories cut to their last 1024 tokens.

The artifact's scripts gave vLLM another order of arrival than Orca: a new conversation begins with probability 0.5 for
the one and 0.1 for the other. The run `as_artifact` repeats that and is compared; in `fair` all have one value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from kvarena.errors import UserError
from kvarena.experiments.kit.latency_curve import (
    CROSSING,
    Curves,
    Line,
    draw_curves,
    guess_of,
    measure_lines,
    summarize_lines,
    unread_rates,
)
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of
from kvarena.harness.record.record import Measured, Recorder
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = CROSSING
COMPARED = "as_artifact"
READS = reads()


@dataclass
class Params(Curves):
    """`params.*` of conf/experiment/chatbot.yaml; null there means: by the profile."""

    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search begins, by system or `others`
    # run -> scheduler (or `others`) -> probability that an arrival begins a new conversation
    new_conversation: dict[str, dict[str, float]] = field(default_factory=dict)
    pool_bytes: int | None = None  # null: the pool the engine ran with


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    rules = {"trace.new_conversation": "params.new_conversation has the probabilities of every run"}
    return rules | unread_rates(run.params, ["params.guess"])


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Both runs; a system whose probability is the same in both is replayed once. Raises UserError without a run."""
    if not run.params.new_conversation:
        raise UserError("params.new_conversation: at least one run, e.g. {fair: {others: 0.5}}")
    return Measured(measure_lines(run, recorder, list(_lines(run))), _notes(run))


def _lines(run: Run[Params]) -> Iterator[Line]:
    """Only `as_artifact` is the published figure's; the engine's constants come from Fig 12a."""
    replayer = Replayer(run)
    for which, values in run.params.new_conversation.items():
        for system in run.systems:
            probability = _probability(which, values, system)
            yield Line(
                key=f"{system.name}, new conversations {probability:g}",
                run=run,
                system=system,
                figure="fig17" if which == COMPARED else None,
                detail=which,
                serve=partial(replayer.serve, system),
                guess=guess_of(run.params.guess, system),
                point={"new_conversation": values},
                trace=replace(run.trace, new_conversation=probability),
            )


def _probability(which: str, values: dict[str, float], system: System) -> float:
    for name in (system.scheduler.name, "others"):
        if name in values:
            return values[name]
    raise UserError(f"params.new_conversation.{which}: neither {system.scheduler.name} nor others")


def _notes(run: Run[Params]) -> dict[str, object]:
    """The workload at one rate: others have as many of the same turns as arrive."""
    rates = run.params.rates or list(run.params.guess.values())
    workload = example_of(run, rate=rates[0])
    means = {"mean_prompt_tokens": workload.prompt_tokens.mean(), "mean_output_tokens": workload.output_tokens.mean()}
    return {"workload": {**workload.provenance, **{name: float(mean) for name, mean in means.items()}}}


summarize = partial(summarize_lines, _lines)
draw = draw_curves
