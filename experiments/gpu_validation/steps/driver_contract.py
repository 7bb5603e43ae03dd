"""The tests that are marked gpu, of the driver, of tensors over its addresses, and of the stores: one run of pytest."""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvarena.experiments.gpu_validation.record import FailedError, NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.paths import ROOT

CASE = "driver, tensors, stores"
_FOLDER = "tests/allocators"


def cases(device: str) -> list[str]:
    """All files at once: collecting them is most of what they cost."""
    return [CASE]


def uses(case: str) -> list[str]:
    """The tests, and what they test."""
    return [_FOLDER, "tests/conftest.py", "allocators"]


def run(case: str, context: Context) -> Values:
    """Run them; a rehearsal takes the contract on the host's driver."""
    files = sorted(ROOT.joinpath(_FOLDER).rglob("test_*.py"))
    if context.on_gpu:
        return run_tests([file for file in files if "mark.gpu" in file.read_text()], ["-m", "gpu"], context)
    return run_tests([file for file in files if file.name == "test_vmm_contract.py"], ["-k", "host"], context)


def run_tests(files: Sequence[Path], chosen: list[str], context: Context) -> Values:
    """Run tests in this process; counts by file and outcome. Raises FailedError that names what failed."""
    import pytest

    report = context.scratch / "tests.xml"
    report.unlink(missing_ok=True)
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]  # not every warning is ours to mend here
    os.chdir(ROOT)
    status = pytest.main([*map(str, files), *chosen, *quiet, f"--junitxml={report}"])
    if not report.is_file():
        raise NotRunError(f"pytest ended with {status} and no report; log.txt says why")
    counts, bad = _counted(report)
    if bad:
        raise FailedError(f"{len(bad)} of {sum(counts.values())} failed: {', '.join(bad)}")
    if not any(name.endswith("passed") for name in counts):
        raise NotRunError(f"no test ran; {sum(counts.values())} were skipped")
    return dict(counts)


def _counted(report: Path) -> tuple[Counter[str], list[str]]:
    """How many passed, were skipped and failed by file, and the names of those that failed."""
    counts, bad = Counter[str](), []
    for test in ElementTree.parse(report).iter("testcase"):
        file = str(test.get("classname")).rsplit(".", 1)[-1]
        if test.find("failure") is not None or test.find("error") is not None:
            counts[f"{file} failed"] += 1
            bad.append(f"{file}: {test.get('name', '?')}")
        else:
            counts[f"{file} {'passed' if test.find('skipped') is None else 'skipped'}"] += 1
    return counts, bad
