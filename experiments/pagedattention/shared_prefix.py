"""A prefix that all prompts share (PagedAttention Fig 16): translation with an instruction and examples in front.

Lengths come from the embedded tables, or from WMT16's own text (trace.path=..., with a tokenizer).
Systems that share keep the prefix resident, written once; Orca writes it anew with every prompt. As in the artifact
the prefix is shared down to a whole number of blocks, and what is left of it belongs to each prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from kvarena.errors import UserError
from kvarena.experiments.kit.latency_curve import (
    CROSSING,
    Curves,
    Line,
    chosen_panels,
    draw_curves,
    guess_of,
    measure_lines,
    summarize_lines,
    unread_panels,
    unread_rates,
    unread_traces,
)
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of, trace_named
from kvarena.harness.record.record import Measured, Recorder
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.run.run import Plain, Run
from kvarena.harness.run.systems import System

HEADLINE = CROSSING
PREFIX_ID = -1  # requests' ids begin at 0
NO_SHARING = ("orca", "fastertransformer")  # schedulers whose systems feed the prefix with every prompt
READS = reads("sharing")


@dataclass
class Panel:
    """One panel of the figure."""

    trace: str  # of conf/trace/
    prefix_tokens: int  # of the prompt's beginning that is shared: whole blocks
    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search begins, by system or `others`


@dataclass
class Params(Curves):
    """`params.*` of conf/experiment/shared_prefix.yaml; null there means: by the profile."""

    panels: dict[str, Panel] = field(default_factory=dict)  # by figure
    only: list[str] | None = None  # figures to run; null: all
    pool_bytes: int | None = None  # null: the pool the engine ran with


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    params: Params = run.params
    rules = unread_panels(params.panels, params.only)
    rules |= unread_rates(params, (f"params.panels.{figure}.guess" for figure in params.panels))
    traces = [panel.trace for panel in chosen_panels(params.panels, params.only).values()]
    return rules | unread_traces(
        run, traces, "params.panels={FIGURE: {trace: NAME, ...}}", of_all=("max_tokens", "path")
    )


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay every panel."""
    notes: dict[str, object] = {}
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        workload = example_of(_panel_run(run, panel), rate=8.0)
        _check_shared(panel, workload.provenance["trace"], figure)
        notes[figure] = {**workload.provenance, "mean_prompt_tokens": float(workload.prompt_tokens.mean())}
    return Measured(measure_lines(run, recorder, list(_lines(run))), notes)


def _panel_run(run: Run[Params], panel: Panel) -> Run[Params]:
    trace = trace_named(run, panel.trace)
    if run.trace.path is not None:  # every panel reads that file, each with its own number of examples
        trace = replace(run.trace, name=trace.name, table=trace.table, examples=trace.examples)
    return replace(run, trace=replace(trace, max_tokens=run.trace.max_tokens))


def _check_shared(panel: Panel, trace: Plain, figure: str) -> None:
    """Refuse to share more than the text of a file's prefix is, by the tokenizer it was counted with."""
    held = trace.get("prefix_tokens", panel.prefix_tokens)
    if panel.prefix_tokens > held:
        raise UserError(
            f"params.panels.{figure}.prefix_tokens={panel.prefix_tokens}: {trace['prefix_path']} begins every prompt "
            f"with {held} tokens of {trace['tokenizer']}: share that many at most, in whole blocks. "
            f"Name the panels anew: params.panels={{{figure}: {{trace, prefix_tokens, guess}}}}"
        )


def _lines(run: Run[Params]) -> Iterator[Line]:
    replayer = Replayer(run, sharing=True)
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        own, prefix = _panel_run(run, panel), Prefix(PREFIX_ID, panel.prefix_tokens)
        for system in run.systems:
            yield Line(
                key=f"{figure} {system.name}",
                run=own,
                system=system,
                figure=figure,
                detail=f"{panel.prefix_tokens} tokens shared",
                serve=partial(replayer.serve, system, prefix=prefix, share_prefix=_shares(system)),
                guess=guess_of(panel.guess, system),
                point={"prefix_tokens": panel.prefix_tokens},
            )


def _shares(system: System) -> bool:
    return system.scheduler.name not in NO_SHARING


summarize = partial(summarize_lines, _lines)
draw = draw_curves
