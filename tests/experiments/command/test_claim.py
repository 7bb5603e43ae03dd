"""`claim=ID`: it runs what the claim needs, no more, and judges that run."""

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command import cli
from kvarena.experiments.command.claim import arguments_for
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.scorecard.claims import claim_named, load_claims

CLAIMED = [claim.id for claim in load_claims()]


def arguments(claim_id: str, on_gpu: bool = False) -> list[str]:
    return arguments_for(claim_named(claim_id), lambda: on_gpu)


def test_only_the_figure_and_the_systems_that_it_asks_for():
    assert arguments("PA-11") == [
        "experiment=serving_latency", "clock=modelled", "params.only=[fig12a]", "systems=[orca-oracle,paged]",
    ]  # fmt: skip
    assert arguments("PA-01") == ["experiment=memory_waste", "clock=modelled", "systems=[orca-max]"]
    assert arguments("PA-08") == ["experiment=memory_layout"]
    assert arguments("PA-07") == []


def test_a_claim_about_a_gpu_takes_its_stand_in_where_there_is_none():
    assert arguments("VA-15") == ["experiment=decode_throughput", "clock=measured"]
    assert "experiment=decode_throughput" in arguments("VA-15", on_gpu=True)
    with pytest.raises(UserError, match=r"VA-02: .*GPU"):
        arguments("VA-02")


def test_what_a_claim_needs_is_asked_under_a_clock_that_there_is():
    assert arguments("VA-04") == ["experiment=allocation_bandwidth"], "its modelled part runs beside the measured one"
    assert arguments("VA-28") == ["experiment=portability", "clock=measured"]
    assert arguments("PA-27") == ["experiment=attention_kernel", "clock=measured"]


def test_every_claim_is_a_command_that_runs_here():
    commands = {tuple(command) for name in CLAIMED if (command := what_runs_here(name))}
    for each in sorted(commands):
        compose_run(*each)  # raises UserError for a clock, system or key that its experiment does not have
    assert len(commands) > 20


def what_runs_here(claim_id: str) -> list[str]:
    claim = claim_named(claim_id)
    return [] if claim.needs_gpu and claim.stand_in is None else arguments(claim_id)


def test_another_device_holds_nothing_of_the_papers(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    given = ("device=h200", "engine=lean", "arrival.duration_s=20", "params.window_s=[5,20]", "params.seeds=[0]")
    assert command(monkeypatch, "claim=PA-03", *given) == 0
    assert "verdict:   holds" not in capsys.readouterr().out


def command(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    monkeypatch.setattr("sys.argv", ["kvarena", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_arithmetic_needs_no_run(monkeypatch, capsys):
    assert command(monkeypatch, "claim=PA-07") == 0
    printed = capsys.readouterr().out
    assert "verdict:   holds (exactly)" in printed
    assert "evidence:  arithmetic" in printed


def test_from_the_command_line_to_the_verdict(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    assert command(monkeypatch, "claim=PA-06") == 0
    assert "verdict:   holds (below 1)" in capsys.readouterr().out
    assert command(monkeypatch, "claim=PA-06", "trace.num_requests=4", "trace.max_tokens=128") == 0
    printed = capsys.readouterr()
    assert "./run.sh experiment=memory_timeline systems=[paged] trace.num_requests=4" in printed.err
    assert "verdict:   not run (below 1)" in printed.out, "another trace is not the one that the claim is judged by"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["claim=PA-99"], "no such claim. There are: PA-01"),
        (["claim=PA-06", "-m"], "takes overrides of its experiment, and no flags"),
        (["claim=PA-06", "params.nothing=1"], "no such key"),
        (["report", "now"], "report: takes no arguments"),
    ],
)
def test_mistakes(monkeypatch, capsys, given, message):
    assert command(monkeypatch, *given) == cli.USER_ERROR
    assert message in capsys.readouterr().err
