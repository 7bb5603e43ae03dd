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
