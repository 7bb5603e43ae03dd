"""The tests that are marked gpu, of the driver, of tensors over its addresses, and of the stores."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from kvarena.experiments.gpu_validation.record import FailedError, NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.paths import ROOT

FILES = ("test_vmm_contract.py", "test_vmm_cuda.py", "test_vmm_tensor.py", "test_stores_cuda.py")


def cases(device: str) -> list[str]:
    """A file of tests each; a rehearsal takes the contract on the host's driver."""
    return list(FILES) if device == "cuda" else list(FILES[:1])


def run(case: str, context: Context) -> Values:
    """Run one file."""
    chosen = ["-m", "gpu"] if context.on_gpu else ["-k", "host"]
    return run_tests(ROOT / "tests" / "allocators" / case, chosen, context)


def run_tests(file: Path, chosen: list[str], context: Context) -> Values:
    """Run tests in a process of their own. Raises FailedError that names those which failed."""
    report = context.scratch / f"{file.stem}.xml"
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]  # not every warning is ours to mend here
    command = [sys.executable, "-P", "-m", "pytest", str(file), *chosen, *quiet, f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.is_file():
        raise NotRunError(f"pytest ended with {done.returncode} and no report; log.txt says why")
    counts, bad = _counted(report)
    if bad:
        raise FailedError(f"{len(bad)} of {sum(counts.values())} failed: {', '.join(bad)}")
    if not counts["passed"]:
        raise NotRunError(f"no test ran; {counts['skipped']} were skipped")
    return counts


def _counted(report: Path) -> tuple[dict[str, int], list[str]]:
    """How many passed and were skipped, and the names of those that did neither."""
    counts, bad = {"passed": 0, "skipped": 0, "failed": 0}, []
    for test in ElementTree.parse(report).iter("testcase"):
        if test.find("failure") is not None or test.find("error") is not None:
            counts["failed"] += 1
            bad.append(test.get("name", "?"))
        else:
            counts["passed" if test.find("skipped") is None else "skipped"] += 1
    return counts, bad
