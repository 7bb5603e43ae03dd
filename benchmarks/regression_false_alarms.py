"""How often the regression gate cries wolf on unchanged code, and how often it sleeps through twice the time.

    ./run.sh benchmark regression_false_alarms [--exact 300] [--timed 20] [--doctored 20]

exact      tier 1, in processes of different hash seeds, against the first of them: about a second each on a free core
timed      tier 2, this tree against itself: about half a minute each
doctored   tier 2, this tree against a copy in which the paged policy takes twice its time; one benchmark, some seconds

No alarm in n runs does not mean none ever: beside each count stands the largest rate that such a count leaves
plausible (one-sided 95 % bound of Clopper and Pearson; with no alarm, about 3 / n).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from scipy import stats

from kvarena.harness.regression import timed
from kvarena.harness.regression.doctored import SLOWED, slower_tree
from kvarena.harness.regression.replays import run_all
from kvarena.harness.regression.side import HEAD
from kvarena.harness.regression.verdict import Verdict

RUNS_PER_PROCESS = 10


def upper_bound(events: int, runs: int, confidence: float = 0.95) -> float:
    """Largest rate at which so few events in so many runs are still as likely as 1 - confidence."""
    return 1.0 if events >= runs else float(stats.beta.ppf(confidence, events + 1, runs - events))


def exact_alarms(runs: int) -> int:
    """Runs of tier 1 whose counts differ from those of the first."""
    first, alarms, done = None, 0, 0
    while done < runs:
        count = min(RUNS_PER_PROCESS, runs - done)
        environment = {**os.environ, "PYTHONHASHSEED": str(done)}
        command = [sys.executable, "-P", __file__, "--count", str(count)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for line in output.splitlines():
            first = first or line
            alarms += line != first
        done += count
        progress("exact", done, runs)
    return alarms


def timed_alarms(runs: int) -> tuple[int, Counter[str], Counter[str]]:
    """Runs of tier 2 with an alarm; alarms by benchmark; and those that a second measurement withdrew."""
    alarms, raised, withdrawn = 0, Counter[str](), Counter[str]()
    for run in range(runs):
        findings = timed.compare_trees(HEAD, HEAD).findings
        bad = [finding.figure for finding in findings if finding.verdict is not Verdict.OK]
        raised.update(bad)
        withdrawn.update(f.figure for f in findings if f.verdict is Verdict.OK and "again" in f.note)
        alarms += bool(bad)
        progress("timed", run + 1, runs)
    return alarms, raised, withdrawn


def missed(runs: int) -> int:
    """Comparisons with the slower copy that did not name the culprit."""
    misses = 0
    with tempfile.TemporaryDirectory() as folder:
        slower = slower_tree(Path(folder))
        for run in range(runs):
            [finding] = timed.compare_trees(HEAD, slower, only=[SLOWED]).findings
            misses += finding.verdict is not Verdict.REGRESSED
            progress("doctored", run + 1, runs)
    return misses


def progress(what: str, done: int, runs: int) -> None:
    """One line that overwrites itself."""
    print(f"\r{what}: {done} of {runs}", end="" if done < runs else "\n", file=sys.stderr, flush=True)


def line(what: str, events: int, runs: int, seconds: float) -> None:
    """A count, and the rate that it leaves plausible."""
    bound = 100 * upper_bound(events, runs)
    print(f"{what:34} {events:4} of {runs:<4} at most {bound:5.2f} % (95 %)   {seconds / runs:6.2f} s each")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=int, default=300)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--doctored", type=int, default=20)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)  # a child: print the counts so many times
    given = parser.parse_args()
    if given.count:
        for _ in range(given.count):
            print(json.dumps(dict(run_all())))
        return
    if given.exact:
        start = perf_counter()
        line("false alarms, exact", exact_alarms(given.exact), given.exact, perf_counter() - start)
    if given.timed:
        start = perf_counter()
        alarms, raised, withdrawn = timed_alarms(given.timed)
        line("false alarms, timed", alarms, given.timed, perf_counter() - start)
        for what, counts in (("raised", raised), ("withdrawn by a second measurement", withdrawn)):
            print(f"  {what}: {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    if given.doctored:
        start = perf_counter()
        line("twice the time, missed", missed(given.doctored), given.doctored, perf_counter() - start)


if __name__ == "__main__":
    main()
