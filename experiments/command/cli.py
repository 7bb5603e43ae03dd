"""The command line: `python -m kvarena experiment=NAME [overrides]`; beside it `kernels`, `regression`, `report` and
`claim=ID`.
"""

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import hydra
import matplotlib as mpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kvarena.errors import UserError
from kvarena.experiments.command import multirun, paths, registry, show, sweep
from kvarena.experiments.command.carry_out import carry_out, summarize
from kvarena.harness.config import check_once, check_overrides, keys_of, on_auto, tell_hydra
from kvarena.harness.paths import CONF
from kvarena.harness.record.record import Recorder, runs_folder
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import schema_of
from kvarena.kernels.threads import set_compute_threads

USER_ERROR, INTERRUPTED = 2, 130
_HELP = {"--help", "-h", "--hydra-help", "--info", "-i", "--cfg", "-c", "--version"}
_MULTIRUN = {"-m", "--multirun"}
_written: list[Path] = []  # folders of this process's runs: `latest` may be another's


def main() -> None:
    """Run what the arguments say and leave with its status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    mpl.rcdefaults()  # figures look and are lettered alike, whatever the user's matplotlibrc says
    sys.exit(guarded(lambda: _command(sys.argv[1:])))


def guarded(command: Callable[[], None]) -> int:
    """Run a command; a user's mistake is one message and no traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues with what is still missing", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not _says_out_of_memory(error):
            raise
        print(f"error: out of memory: {error or 'the system has no more'}", file=sys.stderr)
        return USER_ERROR
    return 0


def _says_out_of_memory(error: Exception) -> bool:
    """Python has a class for it; torch has one for GPUs, and raises a RuntimeError on the host."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _command(arguments: list[str]) -> None:
    match arguments:
        case ["kernels"]:
            from kvarena.experiments.command.kernel_matrix import print_matrix

            print_matrix()
        case ["regression", *rest]:
            from kvarena.harness.regression.gate import main as judge

            sys.exit(judge(rest))
        case ["report", *rest]:
            from kvarena.experiments.command.report import write_report

            if rest:
                raise UserError(f"report: takes no arguments, not {' '.join(rest)}")
            write_report()
        case ["summarize", *rest]:
            if len(rest) != 1:
                raise UserError("summarize: takes the folder of one run")
            show.outcome(summarize(Path(rest[0])), Path(rest[0]))
        case [first, *rest] if first.startswith("claim="):
            _claim(first.removeprefix("claim="), rest)
        case _:
            _experiment(arguments)


def _experiment(arguments: list[str]) -> None:
    """Run the one that is named; or let Hydra help."""
    tell_hydra()
    arguments = paths.quoted(arguments, sweeping=bool(_MULTIRUN & set(arguments)))
    if _HELP & set(arguments):
        sys.argv[1:] = arguments
        _compose_and_run()
        return
    overrides = [a for a in arguments if not a.startswith("-")]
    check_once(overrides)
    experiment = registry.named(overrides)
    arguments = on_auto(arguments)
    if _MULTIRUN & set(arguments):
        _multirun(experiment, [a for a in arguments if a not in _MULTIRUN])
    else:
        check_overrides(overrides, schema_of(overrides, registry.params_schema))
        for each in paths.parsed([a for a in arguments if not a.startswith("-")]):
            if each.is_sweep_override():
                raise UserError(f"{each.input_line}: has several values. -m runs each of them; a list is written [a,b]")
        sys.argv[1:] = arguments
        _compose_and_run()


def _multirun(experiment: str, arguments: list[str]) -> None:
    """Let Hydra run the jobs that are not one run, and make one folder of all."""
    jobs = multirun.jobs_of(arguments)
    for job in jobs.all:
        check_overrides(job, schema_of(job, registry.params_schema))
    whole = sweep.Sweep(experiment, arguments, jobs.within)
    # Hydra takes its overrides in one piece: a flag may stand before them, not among them.
    flags = [a for a in arguments if a.startswith("-")]
    notes = paths.in_quotes(str(runs_folder() / ".hydra"))
    sys.argv[1:] = ["--multirun", *flags, *jobs.across, f"hydra.sweep.dir={notes}"]
    _compose_and_run()
    folder, outcome = whole.finish()
    show.outcome(outcome, folder)
    _check_drawn(folder)


def _claim(claim_id: str, more: list[str]) -> None:
    """Run what a claim needs, and judge it from that run alone."""
    from kvarena.experiments.command.claim import arguments_for, judged, print_verdict
    from kvarena.harness.scorecard.claims import claim_named

    claim = claim_named(claim_id)
    if (_HELP | _MULTIRUN) & set(more):
        raise UserError(f"claim={claim_id}: takes overrides of its experiment, and no flags")
    needed = arguments_for(claim)
    if needed:
        written = keys_of(more)  # they stand for what the claim would write
        sys.argv[1:] = [*(each for each in needed if keys_of([each])[0] not in written), *more]
        print(f"{claim_id} needs: ./run.sh {' '.join(sys.argv[1:])}", file=sys.stderr)
        _command(sys.argv[1:])
    print_verdict(judged(claim, _written[-1] if needed else None))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _compose_and_run(config: DictConfig) -> None:
    """One job. Its mistakes must not reach Hydra, which would print a traceback and leave with 1."""
    status = guarded(lambda: _job(config, list(HydraConfig.get().overrides.task)))
    if status:
        sys.exit(status)


def _job(config: DictConfig, overrides: list[str]) -> None:
    """One run; of a multirun, those that are one, or each by itself where they cannot be."""
    within = sweep.within()
    job = HydraConfig.get().job
    number = 0 if OmegaConf.is_missing(job, "num") else job.num  # a single run has none
    runs = multirun.runs_within(overrides, within) if within else [registry.resolved(config, overrides)]
    one = multirun.as_one(runs, within)
    if one is not None:
        try:
            return _run(one, overrides, [number])
        except UserError as error:
            if len(runs) == 1:
                raise
            print(f"these systems cannot be one run, and are measured one by one: {error}", file=sys.stderr)
    for place, (run, inner) in enumerate(zip(runs, within, strict=True)):
        _run(run, [*overrides, *inner], [number, place])


def _run(run: Run[object], overrides: list[str], place: list[int]) -> None:
    """One run; in a sweep the job of that place."""
    job = sweep.job_folder(run.plain())
    if job is not None and job.is_dir():
        when = datetime.fromtimestamp(job.stat().st_mtime).isoformat(timespec="seconds")
        print(f"already measured by this sweep, {when}: {' '.join(overrides)}", file=sys.stderr)
        return sweep.note(job, overrides, place)
    if run.clock == "measured":
        set_compute_threads(run.threads)
    recorder = Recorder(run.experiment, run.plain(), job)
    outcome = carry_out(run, recorder)
    if job is not None:
        outcome.measured.notes |= sweep.notes(overrides)
        recorder.finish(outcome)
        return sweep.note(job, overrides, place)
    folder = recorder.finish(outcome)
    _written.append(folder)
    show.outcome(outcome, folder)
    _check_drawn(folder)


def _check_drawn(folder: Path) -> None:
    """Raises UserError for a run without its figure."""
    if not (folder / "figure.png").is_file():
        mended = "." if (folder / "jobs").is_dir() else ": ./run.sh summarize draws it once that is mended."
        raise UserError(f"{folder}: has no figure, for drawing it failed; all else is there{mended}")
