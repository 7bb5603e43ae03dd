"""Plant the small faults of tests/mutants.py in copies of the tree, and see whether tests fail: `./run.sh mutants`.

With names, or parts of names, only these. Before anything is planted the tests must pass. Prints a line for each fault:

    caught     a test failed, as it should
    survived   all passed: nobody would have seen the fault
    stale      its text no longer stands exactly once in its file, or its tests cannot be collected

Exit status 0: nothing is stale, and at most `MAY_SURVIVE` have survived.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mutants import MUTANTS, Mutant  # noqa: E402

MAY_SURVIVE = 2
LIMIT_S = 300  # of a fault's tests: whatever takes longer hangs, which is seen too
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "runs", "*_cache")
PASSED, FAILED = 0, 1  # of pytest's exit codes


def run_tests(tree: Path, tests: Iterable[str], limit_s: float | None, out: int | None) -> int | None:
    """pytest's exit code; None where it took too long."""
    paths = [f"tests/{name}" for name in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    own = {"PYTHONPATH": str(tree / ".import"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, cwd=tree, env=os.environ | own, stdout=out, stderr=out, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None


def verdict(mutant: Mutant, tree: Path) -> str:
    """Plant the fault, run its tests, and take it out again."""
    path = tree / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return "stale"
    stat = path.stat()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code = run_tests(tree, mutant.tests.split(), LIMIT_S, subprocess.DEVNULL)
    finally:
        path.write_text(text)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what is compiled of it holds again
    return {PASSED: "survived", FAILED: "caught", None: "caught"}.get(code, "stale")


def are_sound(tests: list[str], trees: list[Path]) -> bool:
    """Whether all tests pass as the trees are; shared out among them."""
    with ThreadPoolExecutor(len(trees)) as pool:
        parts = [tests[number :: len(trees)] for number in range(len(trees))]
        codes = pool.map(lambda tree, part: run_tests(tree, part, None, None) if part else PASSED, trees, parts)
        return all(code == PASSED for code in codes)


def judge(chosen: list[Mutant], trees: list[Path]) -> Counter[str]:
    """Print a line for each fault, as many at once as there are trees. Returns how many got which verdict."""
    free, found = SimpleQueue[Path](), Counter[str]()
    for tree in trees:
        free.put(tree)

    def judged(mutant: Mutant) -> tuple[str, float]:
        tree, start = free.get(), time.monotonic()
        try:
            return verdict(mutant, tree), time.monotonic() - start
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        for mutant, (said, seconds) in zip(chosen, pool.map(judged, chosen), strict=True):
            found[said] += 1
            print(f"{said:9}{mutant.name:52} {mutant.file:48}{seconds:4.0f} s", flush=True)
    return found


def main(names: list[str]) -> int:
    """Judge the chosen faults. Returns the exit status."""
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    if not chosen:
        print(f"no fault is called {' or '.join(names)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kvarena-mutants-") as folder:
        copies = [Path(folder) / str(number) for number in range(min(2, os.cpu_count() or 1))]
        trees = [Path(shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)) for copy in copies]
        if not are_sound(sorted({name for mutant in chosen for name in mutant.tests.split()}), trees):
            print("these tests fail before anything is planted", file=sys.stderr)
            return 2
        found = judge(chosen, trees)
    print(f"{', '.join(f'{count} {said}' for said, count in found.items())}, of {len(chosen)}")
    return int(found["stale"] > 0 or found["survived"] > MAY_SURVIVE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
