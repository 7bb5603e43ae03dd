"""Tier 2 of the gate: the statistics, and the machinery that compares two trees."""

import math
import os
import subprocess
from contextlib import nullcontext
from math import comb, nan
from typing import ClassVar

import numpy as np
import pytest

from kvarena.errors import UserError
from kvarena.harness.regression import baseline, gate, timed
from kvarena.harness.regression.doctored import SLOWED, copy_of_tree, slower_tree
from kvarena.harness.regression.revision import base_revision, checkout
from kvarena.harness.regression.side import HEAD, Side, WorkerDied
from kvarena.harness.regression.significance import MAX_P, MIN_SAMPLES, compare
from kvarena.harness.regression.verdict import Outcome, Status, Verdict


def times(seed: int, mean: float, n: int = 12, noise: float = 0.03) -> list[float]:
    """Samples as a busy machine gives them: a floor, and a long tail above it."""
    return (mean * (1 + noise * np.random.default_rng(seed).exponential(size=n))).tolist()


def test_true_means_slower_by_more_than_a_tenth():
    verdicts = [compare(times(seed, 1.0), times(1000 + seed, 1.2)).slower for seed in range(200)]
    assert all(verdicts)


def test_false_for_the_same_speed():
    """With p alone, one in 500 would be True; with the ratio too, none of 1000 here."""
    results = [compare(times(2 * seed, 1.0), times(2 * seed + 1, 1.0)) for seed in range(1000)]
    assert sum(result.p < MAX_P for result in results) <= 7  # 2 expected
    assert not any(result.slower for result in results)


def test_false_for_a_certain_but_small_slowdown():
    result = compare(times(0, 1.0, noise=0.001), times(1, 1.05, noise=0.001))
    assert result.p < MAX_P
    assert not result.slower


def test_false_for_a_large_but_uncertain_slowdown():
    base, head = [1.0] * 7 + [9.0] * 5, [1.0] * 5 + [9.0] * 7
    result = compare(base, head)
    assert result.ratio == 9
    assert not result.slower


def test_false_for_a_speedup():
    assert not compare(times(0, 1.2), times(1, 1.0)).slower


def test_p_is_the_exact_one_sided_one():
    base, head = [1.0 + i / 100 for i in range(8)], [2.0 + i / 100 for i in range(8)]
    assert compare(base, head).p == pytest.approx(1 / comb(16, 8))
    assert 1 / comb(16, 8) < MAX_P < 1 / comb(10, 5), "8 + 8 samples can reach it, 5 + 5 cannot"


@pytest.mark.parametrize("sample", [nan, math.inf, 0.0, -1.0])
def test_what_is_no_time_cannot_be_judged(sample):
    assert compare(times(0, 1.0), [*times(1, 1.0), sample]) is None


def test_too_few_samples_cannot_be_judged():
    assert compare(times(0, 1.0, MIN_SAMPLES - 1), times(1, 5.0, MIN_SAMPLES - 1)) is None


# ---- two trees, faked ------------------------------------------------------------------------------------------------


class FakeSide:
    """A side whose times are drawn: {benchmark: a factor, an error, or an exception}, by name of the tree."""

    TREES: ClassVar[dict] = {}
    started = 0

    def __init__(self, tree, suite):
        self._plan = self.TREES[tree]
        self.benchmarks = [name for name, result in self._plan.items() if result != "own"]
        self.own = list(self._plan)
        FakeSide.started += 1
        self._rng = np.random.default_rng(FakeSide.started)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, benchmark):
        self._asked = benchmark

    def answer(self):
        result = self._plan[self._asked]
        if isinstance(result, Exception):
            raise result
        return result if isinstance(result, str) else float(result * (1 + 0.03 * self._rng.exponential()))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(timed, "Side", FakeSide)
    monkeypatch.setattr(baseline, "BASELINES", tmp_path)
    monkeypatch.setattr(FakeSide, "started", 0)

    def compare_fakes(base: dict, head: dict) -> Outcome:
        monkeypatch.setattr(FakeSide, "TREES", {"base": base, "head": head})
        return timed.compare_trees("base", "head")

    return compare_fakes


def verdicts(outcome):
    return {finding.figure: finding.verdict for finding in outcome.findings}


def test_twice_the_time_is_caught_and_named(fake):
    outcome = fake({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0})
    assert verdicts(outcome) == {"a": Verdict.OK, "b": Verdict.REGRESSED}
    assert "2.0" in outcome.findings[1].change
    assert "measured again" in outcome.findings[1].note
    assert outcome.status(required=False) is Status.REGRESSED


def test_slowness_that_a_fresh_pair_does_not_confirm_is_no_regression(fake, monkeypatch):
    """What a process has of its layout of memory, it keeps for life."""
    unlucky = FakeSide.__init__

    def init(side, tree, suite):
        unlucky(side, tree, suite)
        if FakeSide.started == 2:  # the first head
            side._plan = {"a": 2.0}

    monkeypatch.setattr(FakeSide, "__init__", init)
    assert verdicts(fake({"a": 1.0}, {"a": 1.0})) == {"a": Verdict.OK}
    assert FakeSide.started == 4


def test_vanished_benchmark_cannot_be_judged(fake):
    outcome = fake({"a": 1.0, "gone": "own"}, {"a": 1.0})
    assert verdicts(outcome) == {"a": Verdict.OK, "gone": Verdict.UNJUDGEABLE}
    assert outcome.status(required=False) is Status.UNJUDGEABLE


def test_retired_benchmark_may_vanish(fake, tmp_path):
    (tmp_path / baseline.LOG).write_text("## ...\n\nRetired: `gone`, superseded\n")
    assert verdicts(fake({"a": 1.0, "gone": "own"}, {"a": 1.0})) == {"a": Verdict.OK}


@pytest.mark.parametrize("broken", [nan, "AttributeError: no such method", WorkerDied("status -11")])
def test_benchmark_that_breaks_on_the_head_cannot_be_judged(fake, broken):
    outcome = fake({"a": 1.0}, {"a": broken})
    assert verdicts(outcome) == {"a": Verdict.UNJUDGEABLE}
    assert str(broken) in outcome.findings[0].note or isinstance(broken, float)
    assert outcome.status(required=False) is Status.UNJUDGEABLE


def test_benchmark_that_the_base_cannot_run_is_new(fake):
    outcome = fake({"a": "ImportError: not there yet"}, {"a": 1.0})
    assert verdicts(outcome) == {"a": Verdict.NEW}
    assert outcome.status(required=False) is Status.OK


# ---- two trees, for real ---------------------------------------------------------------------------------------------


def test_doctored_tree_is_caught_for_real(tmp_path):
    """Child processes, this tree's suite, another tree's package; only what was slowed is named."""
    slower = slower_tree(tmp_path / "slower")
    outcome = timed.compare_trees(HEAD, slower, only=[SLOWED, "paged policy, block by block"])
    assert verdicts(outcome)[SLOWED] is Verdict.REGRESSED


def test_worker_reports_what_a_tree_lacks(tmp_path):
    tree = copy_of_tree(tmp_path / "older")
    (tree / "allocators" / "paged" / "policy.py").unlink()
    (tree / "harness" / "regression" / "timed_suite.py").unlink()
    with Side(tree, timed.SUITE) as side:
        assert side.own == []
        assert "ModuleNotFoundError" in side.sample(SLOWED)
        assert "KeyError" in side.sample("no such benchmark")


def test_tree_that_does_not_start_says_why(tmp_path):
    tree = copy_of_tree(tmp_path / "broken")
    (tree / "kvarena" / "__init__.py").write_text("raise SystemExit('broken tree')")
    with pytest.raises(UserError, match=r"do not start.*broken tree"):
        Side(tree, timed.SUITE)
    with pytest.raises(UserError, match=r"no folder \.import"):
        Side(tmp_path, timed.SUITE)


# ---- which revision --------------------------------------------------------------------------------------------------


class Repository:
    def __init__(self, root, monkeypatch):
        self.root = root
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        for role in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{role}_NAME", "someone")
            monkeypatch.setenv(f"GIT_{role}_EMAIL", "someone@example.org")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments):
        return subprocess.run(("git", *arguments), cwd=self.root, check=True, capture_output=True, text=True).stdout

    def commit(self, text):
        (self.root / "file").write_text(text)
        self.git("add", "file")
        self.git("commit", "--quiet", "-m", text)
        return self.git("rev-parse", "HEAD").strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    return Repository(tmp_path, monkeypatch)


def test_base_is_the_merge_base_with_main_else_the_parent(repository):
    first = repository.commit("first")
    assert base_revision(None, repository.root) is None
    second = repository.commit("second")
    assert base_revision(None, repository.root) == first
    repository.git("checkout", "--quiet", "-b", "branch")
    repository.commit("third")
    repository.commit("fourth")
    assert base_revision(None, repository.root) == second
    assert base_revision("HEAD~3", repository.root) == first


@pytest.mark.parametrize("revision", ["no-such-branch", "--help", "HEAD~9"])
def test_revision_that_does_not_exist_is_refused(repository, revision):
    repository.commit("first")
    with pytest.raises(UserError, match="no such revision"):
        base_revision(revision, repository.root)


def test_checkout_is_the_revision_and_goes_away(repository):
    first = repository.commit("first")
    repository.commit("second")
    with checkout(first, repository.root) as tree:
        assert (tree / "file").read_text() == "first"
    assert not tree.exists()
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_without_git_there_is_no_base(tmp_path):
    assert base_revision(None, tmp_path) is None


def test_without_a_base_only_a_tier_asked_for_fails(monkeypatch):
    monkeypatch.setattr(timed, "base_revision", lambda asked: None)
    outcome = timed.run(None)
    assert "no base" in outcome.not_judged
    assert outcome.status(required=False) is Status.OK
    assert outcome.status(required=True) is Status.UNJUDGEABLE


def test_base_older_than_the_package_is_not_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(timed, "base_revision", lambda asked: "0123456")
    monkeypatch.setattr(timed, "checkout", lambda commit: nullcontext(tmp_path))
    assert "no folder .import" in timed.run(None).not_judged


def test_command_leaves_with_2_where_a_tier_asked_for_is_not_judged(monkeypatch, capsys):
    monkeypatch.setattr(timed, "base_revision", lambda asked: None)
    assert gate.main(["--tier", "2"]) == 2
    assert "not judged" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such revision"):
        gate.main(["--base", "no-such-branch"])
    with pytest.raises(UserError, match="side by side"):
        gate.main(["--tier", "2", "--accept", "slower is fine"])
