"""Where a number comes from, where there is no git to ask."""

import pytest

from kvarena.harness.record import provenance


@pytest.fixture
def no_git(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *arguments: None)
    provenance.git_state.cache_clear()
    yield monkeypatch
    provenance.git_state.cache_clear()


@pytest.mark.parametrize("said", [None, "0123abcd"])
def test_a_copy_without_history_has_the_commit_it_is_told(no_git, said):
    no_git.delenv("KVARENA_COMMIT", raising=False)
    if said:
        no_git.setenv("KVARENA_COMMIT", said)
    assert provenance.git_state() == {"commit": said, "dirty": None, "diff_sha256": None}


@pytest.mark.parametrize(("diff", "untracked"), [("", ""), ("a line", ""), ("", "no_such_file.py")])
def test_code_is_dirty_where_anything_is_uncommitted(no_git, diff, untracked):
    answers = {"rev-parse": "0123abcd", "diff": diff, "ls-files": untracked}
    no_git.setattr(provenance, "_git", lambda command, *rest: answers[command])
    assert provenance.git_state()["dirty"] is bool(diff or untracked)
    assert (provenance.git_state()["diff_sha256"] is None) is not bool(diff or untracked)


@pytest.mark.parametrize("part", ["git_state", "libraries", "machine"])
def test_an_unfinished_run_is_of_its_code_libraries_machine_and_configuration(monkeypatch, part):
    here = provenance.identity({"a": 1})
    assert here == provenance.identity({"a": 1}) != provenance.identity({"a": 2})
    monkeypatch.setattr(provenance, part, lambda: {"changed": True})
    assert provenance.identity({"a": 1}) != here
