"""Tier 1 of the gate: counts, their baseline, and the log that has to explain it."""

import json
import sys

import pytest

from kvarena.allocators.paged.block_tables import BlockTables
from kvarena.errors import UserError
from kvarena.experiments.command import cli
from kvarena.harness.regression import baseline, exact, gate
from kvarena.harness.regression.replays import run_all
from kvarena.harness.regression.verdict import Status, Verdict, overall

TABLE = {
    "sharegpt/paged": {"steps": "2175", "allocations": "6097", "live_pct": "67.798848"},
    "sharegpt/static": {"steps": "7193", "allocations": "150", "live_pct": "20.500833"},
}


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "BASELINES", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def counted():
    return dict(run_all())


def changed(replay: str, **counts: str) -> exact.Table:
    return {**TABLE, replay: {**TABLE[replay], **counts}}


def bad(outcome):
    return {f.figure: f.verdict for f in outcome.findings if f.verdict is not Verdict.OK}


def test_equal_counts_are_ok():
    outcome = exact.judge(TABLE, TABLE)
    assert not bad(outcome)
    assert len(outcome.findings) == 6
    assert outcome.status(required=True) is Status.OK


@pytest.mark.parametrize("steps", ["2176", "2174"])
def test_any_difference_is_a_regression_and_named(steps):
    outcome = exact.judge(TABLE, changed("sharegpt/paged", steps=steps))
    assert bad(outcome) == {"sharegpt/paged: steps": Verdict.REGRESSED}
    assert outcome.status(required=True) is Status.REGRESSED


@pytest.mark.parametrize("broken", ["nan", "inf", "", "many"])
def test_what_is_no_number_cannot_be_judged(broken):
    outcome = exact.judge(TABLE, changed("sharegpt/paged", steps=broken))
    assert bad(outcome) == {"sharegpt/paged: steps": Verdict.UNJUDGEABLE}
    assert outcome.status(required=True) is Status.UNJUDGEABLE


def test_vanished_replay_cannot_be_judged():
    without = {"sharegpt/static": TABLE["sharegpt/static"]}
    outcome = exact.judge(TABLE, without)
    assert set(bad(outcome)) == {f"sharegpt/paged: {q}" for q in ("steps", "allocations", "live_pct")}
    assert "vanished" in outcome.findings[0].note
    assert outcome.status(required=True) is Status.UNJUDGEABLE


def test_new_replay_has_to_be_accepted():
    outcome = exact.judge({}, TABLE)
    assert set(bad(outcome).values()) == {Verdict.UNJUDGEABLE}


def test_csv_comes_back_as_it_was_written():
    table = {**TABLE, "alpaca/paged": {"copies": "120"}}
    assert exact.from_csv(exact.to_csv(table)) == table


def test_baseline_is_accepted_with_its_reason(baselines):
    exact.accept(TABLE.items(), "first")
    exact.accept(changed("sharegpt/paged", steps="2000").items(), "merged steps")
    log = (baselines / baseline.LOG).read_text()
    assert log.index("\nmerged steps\n") < log.index("\nfirst\n")
    assert "- sharegpt/paged: steps 2175 -> 2000" in log
    assert not bad(exact.run(changed("sharegpt/paged", steps="2000").items()))


def test_accepting_nothing_new_writes_nothing(baselines):
    exact.accept(TABLE.items(), "first")
    before = (baselines / baseline.LOG).read_text()
    assert exact.accept(TABLE.items(), "again") == []
    assert (baselines / baseline.LOG).read_text() == before


def test_baseline_changed_without_an_entry_is_refused(baselines):
    exact.accept(TABLE.items(), "first")
    path = baselines / exact.BASELINE
    path.write_text(path.read_text().replace("2175", "2176"))
    outcome = exact.run(changed("sharegpt/paged", steps="2176").items())
    assert outcome.status(required=True) is Status.UNJUDGEABLE
    assert "--accept" in outcome.findings[0].note


def test_entry_without_its_baseline_is_refused(baselines):
    """An older baseline, put back while the log still tells of the newer one."""
    exact.accept(TABLE.items(), "first")
    old = (baselines / exact.BASELINE).read_text()
    exact.accept(changed("sharegpt/paged", steps="2000").items(), "merged steps")
    (baselines / exact.BASELINE).write_text(old)
    assert exact.run(TABLE.items()).status(required=True) is Status.UNJUDGEABLE


def test_line_ends_of_a_checkout_do_not_matter(baselines):
    exact.accept(TABLE.items(), "first")
    path = baselines / exact.BASELINE
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert not bad(exact.run(TABLE.items()))


def test_absent_baseline_cannot_be_judged(baselines):
    assert exact.run(TABLE.items()).status(required=True) is Status.UNJUDGEABLE


@pytest.mark.parametrize("reason", ["", "  "])
def test_accepting_takes_a_reason(baselines, reason):
    with pytest.raises(UserError, match="takes a reason"):
        exact.accept(TABLE.items(), reason)
    assert not list(baselines.iterdir())


def test_what_is_no_number_is_not_accepted(baselines):
    with pytest.raises(UserError, match="sharegpt/paged"):
        exact.accept(changed("sharegpt/paged", steps="nan").items(), "why not")
    assert not list(baselines.iterdir())


def test_retired_benchmarks_are_read_from_the_log(baselines):
    exact.accept(TABLE.items(), "Renamed.\nRetired: `old name`, it measured nothing")
    assert baseline.retired() == {"old name"}


def test_replays_count_what_allocators_do(counted):
    """Every mechanism that the suite is there for has happened in it."""
    assert int(counted["sharegpt/paged"]["preemptions"]) > 0
    assert int(counted["sharegpt/paged-swap"]["swapped_blocks"]) > 0
    assert int(counted["sharegpt/vattention-64kb"]["unmaps"]) > 0
    for replay in ("alpaca-samples", "alpaca-beams"):
        assert int(counted[f"{replay}/paged"]["copies"]) > 0
        assert int(counted[f"{replay}/paged"]["preemptions"]) > 0
        assert int(counted[f"{replay}/paged-swap"]["swapped_blocks"]) > 0
        assert int(counted[f"{replay}/vattention-64kb"]["copies"]) > 0
        assert int(counted[f"{replay}/orca-pow2"]["copies"]) > 0
    assert float(counted["sharegpt/orca-oracle"]["stranded_pct"]) > 0
    assert int(counted["arxiv/vattention-sync-256kb"]["stall_ps"]) > 0
    for replay, counts in counted.items():
        shares = [float(value) for name, value in counts.items() if name.endswith("_pct")]
        assert not shares or sum(shares) == pytest.approx(100, abs=1e-4), replay
    for replay in ("sharegpt/vattention-64kb", "sharegpt/vattention-2mb", "arxiv/vattention-2mb"):
        assert counted[replay]["maps"] == counted[replay]["allocations"]


def test_replays_count_the_same_again(counted):
    assert dict(run_all()) == counted


def test_extra_allocation_per_step_is_caught_and_named(counted, monkeypatch):
    """A block taken and given back in every step: nothing else changes, not even the order of the free list."""

    def wasteful(method):
        def doctored(tables, *arguments):
            if tables.pool.free_units:
                tables.pool.give(tables.pool.take(1))
            return method(tables, *arguments)

        return doctored

    for name in ("grow_each", "stretch"):
        monkeypatch.setattr(BlockTables, name, wasteful(getattr(BlockTables, name)))
    outcome = exact.judge(counted, dict(run_all()))
    assert outcome.status(required=True) is Status.REGRESSED
    culprits = {replay for replay in counted if "/paged" in replay} - {"sharegpt/paged-reserved"}
    figures = {figure for figure in bad(outcome) if figure.endswith(": allocations")}
    assert figures == {f"{replay}: allocations" for replay in culprits}
    assert {figure.split(": ")[1] for figure in bad(outcome)} <= {"allocations", "peak_units"}


def test_command_says_what_changed_and_leaves_with_1(baselines, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gate, "run_all", lambda: changed("sharegpt/paged", allocations="8272").items())
    exact.accept(TABLE.items(), "first")
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert gate.main(["--tier", "1"]) == 1
    table = capsys.readouterr().out
    assert "| sharegpt/paged: allocations | 6097 | 8272 | +2175 (+35.67 %) | **regressed** |" in table
    assert summary.read_text() == table


def test_json_holds_one_kind_per_file(baselines, monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "run_all", TABLE.items)
    exact.accept(TABLE.items(), "first")
    assert gate.main(["--tier", "1", "--json", str(tmp_path / "figures.json")]) == 0
    smaller = json.loads((tmp_path / "figures.json").read_text())
    assert {"name": "sharegpt/paged: steps", "unit": "steps", "value": 2175.0} in smaller
    [paged, _] = json.loads((tmp_path / "figures.bigger.json").read_text())
    assert paged == {"name": "sharegpt/paged: live_pct", "unit": "%", "value": 67.798848}
    assert not any("live_pct" in entry["name"] for entry in smaller)


def test_command_line_leaves_with_the_status_of_the_gate(baselines, monkeypatch):
    monkeypatch.setattr(gate, "run_all", lambda: changed("sharegpt/paged", steps="2176").items())
    exact.accept(TABLE.items(), "first")
    monkeypatch.setattr(sys, "argv", ["kvarena", "regression", "--tier", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1


def test_committed_baseline_and_log_belong_together():
    assert exact.from_csv(baseline.read(exact.BASELINE))


def test_a_regression_outranks_what_cannot_be_judged():
    assert overall([Status.OK, Status.UNJUDGEABLE, Status.REGRESSED]) is Status.REGRESSED
    assert overall([Status.OK, Status.UNJUDGEABLE]) is Status.UNJUDGEABLE
    assert overall([Status.OK]) is Status.OK
