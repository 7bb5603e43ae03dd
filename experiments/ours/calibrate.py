"""A device model of this machine: fitted to its kernels, tested on loads it was not fitted to, and on whole replays.

Half of the loads are fitted, in turn along each axis; the other half, and the replays, are predicted.
"""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.legend import swept
from kvarena.experiments.kit.replay import Replayer, example_of, workload_of
from kvarena.experiments.ours.calibration_rounds import Params, measured_rounds, replay_metrics
from kvarena.experiments.ours.step_fit import Fitted, Limits, fit, predicted_s, yaml_files
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.engine_fit import misfit
from kvarena.harness.modelled.step_model import StepLoad
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import Evidence, Names, SummaryRow, row
from kvarena.harness.run.published import named, without_trace
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import distinct

NAME = "calibrate"
HEADLINE = "modelled_over_measured"
METRICS = {"e2el_mean": "e2el_mean_s", "ttft_mean": "ttft_mean_s", "tpot_mean": "tpot_mean_s",
           "makespan": "makespan_s"}  # fmt: skip
READS = {"measured": ("model", "trace", "arrival", "decoding", "device", "systems", "threads")}
CONSTANTS = {"weights_efficiency": "ratio", "kv_efficiency": "ratio", "flop_efficiency": "ratio", "host_step_us": "us",
             "host_sequence_us": "us"}  # fmt: skip
PHASES = ("step_s", "host_s", "append_s", "attention_s", "projections_s")


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    return {}


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Measure, fit and predict."""
    _check(run)
    frames = recorder.cell("rounds", lambda: measured_rounds(run, workload_of(run)))
    loads = _loads(frames["known_steps"])
    limits = Limits(*frames["limits"].max()[list(Limits._fields)])
    fitted = fit(loads[loads.fitted], limits, run.model, run.params.name)
    made = {
        "loads": loads.assign(predicted_s=predicted_s(fitted, run.model, loads)),
        "modelled_replays": _modelled_replays(run, fitted),
        "constants": pd.DataFrame([{name: getattr(fitted.engine, name) for name in CONSTANTS} | limits._asdict()]),
    }
    notes = {
        "workload": example_of(run).provenance,
        "rms_log_error": _rms_errors(made["loads"]),
        "limits": limits._asdict(),
    }
    return Measured(frames | made, notes, yaml_files(fitted))


def _check(run: Run[Params]) -> None:
    params: Params = run.params
    if run.device.kind != "cpu":
        raise UserError(f"device={run.device.name}: {NAME} knows the steps of a CPU, device=cpu, so far")
    if (
        reason := misfit(EngineConfig(params.name, False, models=[run.model.name]), run.device, run.model, "")
    ) is not None:
        raise UserError(f"model={run.model.name}: a fitted engine {reason}")
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


def _modelled_replays(run: Run[Params], fitted: Fitted) -> pd.DataFrame:
    """The same requests on the fitted device, one row per system."""
    replayer, workload = Replayer(_modelled(run, fitted.device, fitted.engine)), workload_of(run)
    return pd.DataFrame([{"system": s.name, **replay_metrics(replayer, s, workload)} for s in run.systems])


def _modelled(run: Run[Params], device: DeviceConfig, engine: EngineConfig) -> Run[Params]:
    """The run on the fitted device. Its engine times whole steps, so kernels do not tell its systems apart."""
    return replace(run, clock="modelled", device=device, engine=engine, systems=distinct(run.systems, by_kernel=False))


def _rms_errors(loads: pd.DataFrame) -> dict[str, float]:
    """RMS of log(predicted / measured) of whole steps, of the fitted loads and of the others."""
    errors = np.log(loads.predicted_s / loads.step_s) ** 2
    return {"fitted": float(errors[loads.fitted].mean() ** 0.5), "held_out": float(errors[~loads.fitted].mean() ** 0.5)}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Every load and every replay, measured and modelled, and the constants between them."""
    name, constants, loads = run.params.name, frames["constants"].iloc[0], frames["loads"]
    modelled = _modelled(run, DeviceConfig(name, "modelled"), EngineConfig(name, overlaps_host=False))
    by_load, by_model = without_trace(run), without_trace(modelled)
    system = run.systems[0]
    for load in loads.to_dict("records"):
        yield from _load_rows(by_load, by_model, load)
    for quantity, unit in CONSTANTS.items():
        yield row(constants[quantity], quantity=quantity, unit=unit, **named(by_model, system, fitted=True))
    yield row(constants.read_gb_per_s, quantity="streaming_read", unit="GB/s", **named(by_load, system))
    yield row(1e3 * constants.tflop_per_s, quantity="matrix_product", unit="GFLOP/s", **named(by_load, system))
    for which, error in _rms_errors(loads).items():
        names = named(by_model, system, fitted=which == "fitted")
        yield row(100 * error, quantity=f"step_time_rms_log_error:{which}", unit="%", **names)
    replays = frames["replays"].merge(frames["modelled_replays"], on="system", suffixes=("", "_modelled"))
    for system, on_model in zip(run.systems, modelled.systems, strict=True):
        yield from _replay_rows(named(run, system), named(modelled, on_model), replays[replays.system == system.name])


def _load_rows(run: Run[Params], modelled: Run[Params], load: dict[Hashable, Any]) -> Iterator[SummaryRow]:
    """Step times, measured and modelled, and what each kernel reached."""
    system, decodes = run.systems[0], load["axis"] == "decode"
    of = partial(named, system=system, x=load["x"], detail=f"batch {load['group']}" if decodes else "a prompt")
    measured = of(run)
    quantity = "step_time_vs_context" if decodes else "step_time_vs_prompt"
    yield row(1e3 * load["step_s"], quantity=quantity, unit="ms", **measured)
    yield row(1e3 * load["predicted_s"], quantity=quantity, unit="ms", **of(modelled, fitted=load["fitted"]))
    rate = 2e-9 * run.model.step_parameters() * load["tokens"] / load["projections_s"]
    yield row(rate, quantity=quantity.replace("step_time", "projections"), unit="GFLOP/s", **measured)
    append_us = 1e6 * load["append_s"] / load["tokens"]
    yield row(append_us, quantity=quantity.replace("step_time", "append_per_token"), unit="us", **measured)
    if decodes:
        bandwidth = run.model.kv_layout().token_bytes * load["context"] / load["attention_s"] / 1e9
        yield row(bandwidth, quantity="kv_read_bandwidth_vs_context", unit="GB/s", **measured)


def _replay_rows(here: Names, there: Names, replays: pd.DataFrame) -> Iterator[SummaryRow]:
    """Each metric measured and modelled, and their ratio, round by round; `here` and `there` are what they are."""
    for name, column in METRICS.items():
        yield row(median_interval(replays[column]), quantity=name, unit="s", **here)
        yield row(float(replays[f"{column}_modelled"].iloc[0]), quantity=name, unit="s", **there)
        ratio = median_interval(replays[f"{column}_modelled"] / replays[column])
        yield row(ratio, quantity=f"{HEADLINE}:{name}", unit="ratio", **there)


def draw(summary: pd.DataFrame) -> Figure:
    """Left every load, modelled over measured; right the replays."""
    figure, (left, right) = plots.canvas(1, 2, width=5.6, height=4.2)
    _loads_axis(left, summary[summary.quantity.isin(["step_time_vs_context", "step_time_vs_prompt"])])
    _replays_axis(right, summary)
    figure.tight_layout()
    return figure


def _loads_axis(axis: Axes, rows: pd.DataFrame) -> None:
    place = ["load", "job", "quantity", "x"]  # a setup ends with the device, which differs
    rows = rows.assign(load=rows.setup.str.rpartition(", ")[0], job=swept(rows))
    measured = rows[rows.clock == "measured"].set_index(place).value
    modelled = rows[rows.clock == "modelled"].set_index(place)
    for quantity, marker in (("step_time_vs_context", "o"), ("step_time_vs_prompt", "s")):
        for kind, face in ((Evidence.CALIBRATED, "#0072B2"), (Evidence.PREDICTED, "white")):
            part = modelled[(modelled.index.get_level_values("quantity") == quantity) & (modelled.evidence == kind)]
            what = "decodes" if quantity == "step_time_vs_context" else "a prompt"
            said = "fitted" if kind is Evidence.CALIBRATED else "held out"
            axis.plot(measured.loc[part.index], part.value, marker, mfc=face, mec="#0072B2", label=f"{what}, {said}")
    ends = [measured.min() * 0.8, measured.max() * 1.25]
    axis.plot(ends, ends, color="black", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured step, ms", ylabel="modelled step, ms")
    axis.set_title(f"steps of known load: {rows.model.iloc[0]}\n{rows.device.iloc[0]}, and its fitted model")
    axis.legend(fontsize=7, frameon=False)


def _replays_axis(axis: Axes, summary: pd.DataFrame) -> None:
    rows = summary[summary.quantity.str.startswith(f"{HEADLINE}:")]
    metrics = list(dict.fromkeys(rows.quantity))
    for number, (name, part) in enumerate(rows.groupby("label", sort=False)):
        x = np.arange(len(metrics)) + 0.15 * number
        spread = [part.value - part.ci_low.fillna(part.value), part.ci_high.fillna(part.value) - part.value]
        axis.errorbar(
            x, part.value, yerr=spread, fmt=plots.MARKERS[number % len(plots.MARKERS)], ms=5, capsize=2, label=str(name)
        )
    axis.axhspan(0.9, 1.1, color="black", alpha=0.08, lw=0)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(range(len(metrics)), [m.partition(":")[2].replace("_", " ") for m in metrics])
    axis.set(ylabel="modelled over measured", title=f"whole replays: {rows.setup.iloc[0]}\nband: within 10 %")
    axis.legend(fontsize=7, frameon=False)
