"""A device model of this machine: fitted to its kernels, tested on loads it was not fitted to, and on whole replays.

Half of the loads are fitted, in turn along each axis; the other half, and the replays, are predicted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.calibration_rounds import measured_rounds, replay_metrics
from kvarena.experiments.replay import Replayer, workload_of
from kvarena.experiments.step_fit import Fitted, Limits, fit, predicted_s, yaml_files
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.step_model import StepLoad
from kvarena.harness.summary import SummaryRow, frame, row
from kvarena.harness.systems import System

NAME = "calibrate"
HEADLINE = "modelled_over_measured"
METRICS = {"e2el_mean": "e2el_mean_s", "ttft_mean": "ttft_mean_s", "tpot_mean": "tpot_mean_s",
           "makespan": "makespan_s"}  # fmt: skip
PHASES = ("step_s", "host_s", "append_s", "attention_s", "projections_s")


@dataclass
class Params:
    """`params.*` of conf/experiment/calibrate.yaml; null there means: by the profile."""

    name: str = "this-machine"  # of the fitted device and engine
    batch_sizes: list[int] = field(default_factory=list)  # decode loads: every batch size ...
    contexts: list[int] = field(default_factory=list)  # ... at every context
    prompts: list[int] = field(default_factory=list)  # prefill loads: tokens
    pool_bytes: int | None = None  # of the replays
    rounds: int = 0  # every load and every replay once in each; at least 6 give 95 %
    steps_per_round: int = 0  # of each load


def run(run: Run, recorder: Recorder) -> Outcome:
    """Measure, fit, predict, compare."""
    _check(run)
    frames = recorder.cell("rounds", lambda: measured_rounds(run, workload_of(run)))
    loads = _loads(frames["steps"])
    limits = Limits(*frames["limits"].max()[list(Limits._fields)])
    fitted = fit(loads[loads.fitted], limits, run.model, run.params.name)
    loads = loads.assign(predicted_s=predicted_s(fitted, run.model, loads))
    replays = frames["replays"].merge(_modelled_replays(run, fitted), on="system", suffixes=("", "_modelled"))
    summary = frame(_summary(run, loads, limits, fitted, replays))
    notes = {"workload": workload_of(run).provenance, "rms_log_error": _rms_errors(loads), "limits": limits._asdict()}
    return Outcome(summary, replays, loads, HEADLINE, draw(summary), notes, yaml_files(fitted))


def _check(run: Run) -> None:
    params: Params = run.params
    if run.device.kind != "cpu":
        raise UserError(f"device={run.device.name}: {NAME} knows the steps of a CPU, device=cpu, so far")
    for key in ("batch_sizes", "contexts", "prompts"):
        values = getattr(params, key)
        if len(values) < 3 or min(values) < 1 or len(set(values)) < len(values):
            raise UserError(
                f"params.{key}={values}: at least 3 are needed, each 1 or more, none twice: half are fitted"
            )
    most = run.model.max_tokens - params.rounds * params.steps_per_round - 3
    if params.rounds < 1 or params.steps_per_round < 1 or max(*params.contexts, *params.prompts) > most:
        raise UserError(
            f"params.contexts={params.contexts}, params.prompts={params.prompts}: params.rounds={params.rounds} of "
            f"params.steps_per_round={params.steps_per_round} (at least 1 each) leave {most} tokens of the "
            f"{run.model.max_tokens} of {run.model.name}"
        )
    if not run.systems or run.systems[0].allocator.name != "paged":
        raise UserError("systems: the first is calibrated, and must be one with allocator paged")


def _loads(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per load: its mean, since contexts grow by one a step, and the mean seconds of every phase.

    Means, not medians: a replay is a sum of steps, those that something disturbed included.
    """
    by_load = steps[steps["round"] >= 0].groupby(["axis", "group", "x", "fitted"], sort=False)
    return by_load[[*StepLoad._fields, *PHASES]].mean().reset_index()


def _modelled_replays(run: Run, fitted: Fitted) -> pd.DataFrame:
    """The same requests on the fitted device, one row per system."""
    modelled = replace(run, clock="modelled", device=fitted.device, engine=fitted.engine)
    replayer, workload = Replayer(modelled), workload_of(run)
    return pd.DataFrame([{"system": s.name, **replay_metrics(replayer, s, workload)} for s in run.systems])


def _rms_errors(loads: pd.DataFrame) -> dict[str, float]:
    """RMS of log(predicted / measured) of whole steps, of the fitted loads and of the others."""
    errors = np.log(loads.predicted_s / loads.step_s) ** 2
    return {"fitted": float(errors[loads.fitted].mean() ** 0.5), "held_out": float(errors[~loads.fitted].mean() ** 0.5)}


def _summary(
    run: Run, loads: pd.DataFrame, limits: Limits, fitted: Fitted, replays: pd.DataFrame
) -> Iterator[SummaryRow]:
    system = run.systems[0]
    ours = {"experiment": NAME, "paper": "kvarena", "figure": NAME, "model": run.model.name}
    about = {"system": system.label, "allocator": system.allocator.name, "kernel": system.kernel.name}
    measured = ours | about | {"clock": "measured", "device": run.device_name, "evidence": "measured"}
    modelled = ours | about | {"kernel": fitted.engine.name, "clock": "modelled", "device": fitted.device.name}
    yield from _load_rows(run, loads, measured, modelled)
    constants = {"panel": run.model.name, **modelled, "evidence": "calibrated"}
    for name, unit in (("weights_efficiency", "ratio"), ("kv_efficiency", "ratio"), ("flop_efficiency", "ratio"),
                       ("host_step_us", "us"), ("host_sequence_us", "us")):  # fmt: skip
        yield row(getattr(fitted.engine, name), quantity=name, unit=unit, **constants)
    yield row(limits.read_gb_per_s, quantity="streaming_read", unit="GB/s", panel=run.model.name, **measured)
    yield row(1e3 * limits.tflop_per_s, quantity="matrix_product", unit="GFLOP/s", panel=run.model.name, **measured)
    for which, error in _rms_errors(loads).items():
        kind = "calibrated" if which == "fitted" else "predicted"
        yield row(
            100 * error, quantity=f"step_time_rms_log_error:{which}", unit="%", **(constants | {"evidence": kind})
        )
    for system in run.systems:
        yield from _replay_rows(run, system, replays[replays.system == system.name], ours, fitted)


def _load_rows(
    run: Run, loads: pd.DataFrame, measured: dict[str, Any], modelled: dict[str, Any]
) -> Iterator[SummaryRow]:
    """Step times, measured and modelled, and what each kernel reached."""
    for _, load in loads.iterrows():
        decodes = load.axis == "decode"
        panel = f"{run.model.name} batch {load.group}" if decodes else f"{run.model.name} prompt"
        at = {"panel": panel, "x": load.x}
        quantity = "step_time_vs_context" if decodes else "step_time_vs_prompt"
        kind = "calibrated" if load.fitted else "predicted"
        yield row(1e3 * load.step_s, quantity=quantity, unit="ms", **at, **measured)
        yield row(1e3 * load.predicted_s, quantity=quantity, unit="ms", **at, **modelled, evidence=kind)
        rate = 2e-9 * run.model.step_parameters() * load.tokens / load.projections_s
        yield row(rate, quantity=quantity.replace("step_time", "projections"), unit="GFLOP/s", **at, **measured)
        yield row(1e6 * load.append_s / load.tokens, quantity=quantity.replace("step_time", "append_per_token"),
                  unit="us", **at, **measured)  # fmt: skip
        if decodes:
            bandwidth = run.model.kv_layout().token_bytes * load.context / load.attention_s / 1e9
            yield row(bandwidth, quantity="kv_read_bandwidth_vs_context", unit="GB/s", **at, **measured)


def _replay_rows(
    run: Run, system: System, replays: pd.DataFrame, ours: dict[str, Any], fitted: Fitted
) -> Iterator[SummaryRow]:
    """Each metric measured and modelled, and their ratio, round by round."""
    about = {"panel": f"{run.model.name} {run.trace.name}", "system": system.label, "allocator": system.allocator.name}
    measured = about | {"kernel": system.kernel.name, "clock": "measured", "device": run.device_name,
                        "evidence": "measured"}  # fmt: skip
    modelled = about | {"kernel": fitted.engine.name, "clock": "modelled", "device": fitted.device.name,
                        "evidence": "predicted"}  # fmt: skip
    for name, column in METRICS.items():
        yield row(median_interval(replays[column]), quantity=name, unit="s", **ours, **measured)
        yield row(float(replays[f"{column}_modelled"].iloc[0]), quantity=name, unit="s", **ours, **modelled)
        ratio = median_interval(replays[f"{column}_modelled"] / replays[column])
        yield row(ratio, quantity=f"{HEADLINE}:{name}", unit="ratio", **ours, **modelled)


def draw(summary: pd.DataFrame) -> Figure:
    """Left every load, modelled over measured; right the replays."""
    figure, (left, right) = plots.canvas(1, 2, width=5.6, height=4.2)
    _loads_axis(left, summary[summary.quantity.isin(["step_time_vs_context", "step_time_vs_prompt"])])
    _replays_axis(right, summary)
    figure.tight_layout()
    return figure


def _loads_axis(axis: Axes, rows: pd.DataFrame) -> None:
    measured = rows[rows.clock == "measured"].set_index(["panel", "quantity", "x"]).value
    modelled = rows[rows.clock == "modelled"].set_index(["panel", "quantity", "x"])
    for quantity, marker in (("step_time_vs_context", "o"), ("step_time_vs_prompt", "s")):
        for kind, face in (("calibrated", "#0072B2"), ("predicted", "white")):
            part = modelled[(modelled.index.get_level_values("quantity") == quantity) & (modelled.evidence == kind)]
            what = "decodes" if quantity == "step_time_vs_context" else "a prompt"
            said = "fitted" if kind == "calibrated" else "held out"
            axis.plot(measured.loc[part.index], part.value, marker, mfc=face, mec="#0072B2", label=f"{what}, {said}")
    ends = [measured.min() * 0.8, measured.max() * 1.25]
    axis.plot(ends, ends, color="black", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured step, ms", ylabel="modelled step, ms")
    axis.set_title(f"steps of known load: {rows.model.iloc[0]}\n{rows.device.iloc[0]}, and its fitted model")
    axis.legend(fontsize=7, frameon=False)


def _replays_axis(axis: Axes, summary: pd.DataFrame) -> None:
    rows = summary[summary.quantity.str.startswith(f"{HEADLINE}:")]
    metrics = list(dict.fromkeys(rows.quantity))
    for number, (name, part) in enumerate(rows.groupby("system", sort=False)):
        x = np.arange(len(metrics)) + 0.15 * number
        spread = [part.value - part.ci_low.fillna(part.value), part.ci_high.fillna(part.value) - part.value]
        axis.errorbar(x, part.value, yerr=spread, fmt=plots.MARKERS[number], ms=5, capsize=2, label=str(name))
    axis.axhspan(0.9, 1.1, color="black", alpha=0.08, lw=0)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(range(len(metrics)), [m.partition(":")[2].replace("_", " ") for m in metrics])
    axis.set(ylabel="modelled over measured", title=f"whole replays: {rows.panel.iloc[0]}\nband: within 10 %")
    axis.legend(fontsize=7, frameon=False)
