"""What it takes to load a million requests from a CSV: seconds and memory of a fresh process, imports included.

    ./run.sh benchmark loading

Beside it what this machine takes to do less with the same bytes: only read them, split them into lines, parse them with
Python's csv. At most 5 s and 500 MB is asked of the loader.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROWS = 1_000_000
ROUNDS = 3
PROGRAMS = {
    "load_trace": (
        "from kvarena.harness.trace import TraceConfig, load_trace\n"
        "trace = load_trace(TraceConfig(path=path))\n"
        "print(len(trace), trace.prompt_tokens.sum(), trace.output_tokens.sum())"
    ),
    "its imports": "import kvarena.harness.trace.reading",
    "bytes": "print(len(open(path, 'rb').read()))",
    "lines": "print(sum(1 for line in open(path)))",
    "csv.reader": "import csv\nprint(len(list(csv.reader(open(path)))))",
}
# Of this program alone: what getrusage says begins with what the parent had.
END = """
import re, time
print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], time.process_time())
"""


def rows(path: Path) -> str:
    """Write the file; what a loader must say of it."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "arrival_s": random.exponential(0.1, ROWS).cumsum().round(6),
            "prompt_tokens": random.integers(1, 8192, ROWS),
            "output_tokens": random.integers(1, 1024, ROWS),
        }
    )
    frame.to_csv(path, index=False)
    return f"{ROWS} {frame.prompt_tokens.sum()} {frame.output_tokens.sum()}"


def run(program: str, path: Path) -> tuple[float, float, float, str]:
    """Seconds of the wall clock and of CPU, peak MB and what was printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"path = {str(path)!r}\n{program}\n{END}"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    *said, used = done.stdout.split("\n")[:-1]
    peak, cpu = used.split()
    return seconds, float(cpu), int(peak) / 1e3, " ".join(said)


def main() -> None:
    """Measure and print; the least of some rounds, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.csv"
        wanted = rows(path)
        print(f"{ROWS} rows, {path.stat().st_size / 1e6:.0f} MB; least of {ROUNDS}, each in a process of its own")
        rounds = [{name: run(program, path) for name, program in PROGRAMS.items()} for _ in range(ROUNDS)]
    assert all(each["load_trace"][3] == wanted for each in rounds), "the sums are not those of the file"
    for name in PROGRAMS:
        wall, cpu, peak = (min(each[name][i] for each in rounds) for i in range(3))
        print(f"{name:<14}{wall:7.2f} s{cpu:7.2f} s of CPU{peak:7.0f} MB")


if __name__ == "__main__":
    main()
