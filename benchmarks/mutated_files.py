"""How many files of traces, whole or with one thing wrong, are loaded with a record unaccounted for: of 10,000 none.

    ./run.sh benchmark mutated_files [COUNT [FIRST]]

tests/trouble/test_mutated_files.py says what is demanded, of 200 files. Here a file is what its number draws, from
FIRST on: one that is complained of is made again with `trace_file(random.Random(number).choice)`.
"""

import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kvarena.harness.paths import ROOT

sys.path.append(str(ROOT / "tests"))
from made_data import write_tokenizer
from trace_mutations import trace_file
from traces_loaded import Loader


def main(count: int = 10_000, first: int = 0) -> None:
    """Try them and print. Exits with 1 where a record is unaccounted for."""
    logging.disable(logging.WARNING)  # of each record that is skipped
    tried: Counter[str] = Counter()
    wrong = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(Path(folder), write_tokenizer(Path(folder)))
        for number in range(first, first + count):
            file = trace_file(random.Random(number).choice)
            tried[file.mutation] += 1
            if complaints := loader.complaints(file):
                wrong += 1
                print(f"file {number}, {file}", *complaints, "", sep="\n  ")
    print(*(f"{number:6} {mutation}" for mutation, number in tried.most_common()), sep="\n")
    print(
        f"{count} files in {time.perf_counter() - start:.0f} s: {loader.loaded} loaded with {loader.records} records, "
        f"{loader.refused} refused as a whole; {wrong} with a record unaccounted for"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
