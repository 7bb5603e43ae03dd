"""What an unfinished run is of."""

import pytest

from kvarena.harness.record import provenance


@pytest.mark.parametrize("part", ["git_state", "libraries", "machine"])
def test_an_unfinished_run_is_of_its_code_libraries_machine_and_configuration(monkeypatch, part):
    here = provenance.identity({"a": 1})
    assert here == provenance.identity({"a": 1}) != provenance.identity({"a": 2})
    monkeypatch.setattr(provenance, part, lambda: {"changed": True})
    assert provenance.identity({"a": 1}) != here
