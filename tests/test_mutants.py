"""The list of planted faults fits the code: `./run.sh mutants` plants them, which takes minutes."""

from collections import Counter

import pytest
from mutants import MUTANTS, Mutant

from kvarena.harness.paths import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_stands_once_in_its_file_and_its_tests_are_there(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, "the code has changed: let the fault follow, in tests/mutants.py"
    assert mutant.new not in ("", mutant.old)
    assert "\n" not in mutant.old + mutant.new
    for name in mutant.tests.split():
        path, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / "tests" / path).read_text()


def test_there_are_faults_of_every_kind() -> None:
    assert len(MUTANTS) >= 60
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    folders = {"/".join(mutant.file.split("/")[:2]) for mutant in MUTANTS}
    assert len(folders) > 15
