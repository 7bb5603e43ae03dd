"""Tables of what has run where: of one folder's records, and those in docs/gpu.md of all that are kept and planned.

./run.sh gpu-validation --docs      rewrites the latter from results/*/gpu_validation/validation.jsonl
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.plan import PLANS, RESERVE_S, Row
from kvarena.experiments.gpu_validation.record import Record, Result, latest, read
from kvarena.experiments.gpu_validation.step import STEPS
from kvarena.harness.paths import RESULTS, ROOT

DOCS = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- written by ./run.sh gpu-validation --docs -->", "<!-- end of what is written -->"
_HEADER = "| what | GPU | versions | commit | date | result |\n|---|---|---|---|---|---|\n"
_MOST_VALUES = 6  # of a case that are shown; validation.jsonl has all


def written(records: Iterable[Record]) -> str:
    """Tables of the steps that have records."""
    found = latest(records)
    parts = []
    for step in STEPS:
        lines = [_line(case, found[step.name, case]) for name, case in found if name == step.name]
        if lines:
            parts.append(f"### {step.name}\n\n{step.about}\n\n{_HEADER}" + "".join(lines))
    return "\n".join(parts)


def kept_records(results: Path = RESULTS) -> list[Record]:
    """Records of every GPU under results/, oldest first."""
    files = sorted(results.glob("*/gpu_validation/validation.jsonl"))
    return sorted((record for file in files for record in read(file)), key=lambda record: record.at)


def of_all_steps(records: Iterable[Record]) -> str:
    """Tables of every step and case there is; those without a record say "not run"."""
    found = latest(record for record in records if record.origin.device != "cpu")
    return "\n".join(
        f"### {step.name}\n\n{step.about[0].upper()}{step.about[1:]}.\n\n{_HEADER}"
        + "".join(_line(case, found.get((step.name, case))) for case in step.cases("cuda"))
        for step in STEPS
    )


def of_plans() -> str:
    """What either plan runs, and how long each part is assumed to take."""
    parts = []
    for number, rows in PLANS.items():
        reserve = RESERVE_S if number > 1 else 0.0
        lines = [_planned(row) for row in rows] + (
            [f"| what failed | | {reserve:g} | a reserve |\n"] if reserve else []
        )
        seconds = sum(row.seconds for row in rows) + reserve
        heading = f"### plan {number}: {seconds:g} s"
        parts.append(f"{heading}\n\n| step | cases | assumed, s | why |\n|---|---|---|---|\n{''.join(lines)}")
    return "\n".join(parts)


def _planned(row: Row) -> str:
    cases = row.cases("cuda")
    shown = "; ".join(cases) if len(cases) <= 4 else f"{len(cases)}: {'; '.join(row.patterns)}"
    return f"| {row.step.name} | {_escaped(shown)} | {row.seconds:g} | {_escaped(row.source)} |\n"


def with_tables(text: str, tables: str) -> str:
    """The page `text` with these tables between its marks. Raises UserError where it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{DOCS.name}: the lines {BEGIN} and {END} are missing, between which the tables stand")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def write_docs() -> None:
    """Rewrite the tables in docs/gpu.md."""
    DOCS.write_text(with_tables(DOCS.read_text(), tables(kept_records())))


def tables(records: Iterable[Record]) -> str:
    """All that is written into docs/gpu.md."""
    return f"## The two plans\n\n{of_plans()}\n## What has run where\n\n{of_all_steps(records)}"


def _line(case: str, record: Record | None) -> str:
    if record is None or (record.result is Result.NOT_RUN and record.origin.device == "unknown"):
        return f"| {case} | - | - | - | - | not run |\n"
    where = record.origin
    cells = (case, where.device, where.libraries, where.commit, record.at[:10], " ".join(_said(record)))
    return "| " + " | ".join(_escaped(cell) or "-" for cell in cells) + " |\n"


def _said(record: Record) -> Iterator[str]:
    yield f"{record.result}{':' if record.reason else ''}"
    if record.reason:
        yield record.reason[:160]
    if record.values:
        shown = list(record.values.items())[:_MOST_VALUES]
        more = len(record.values) - len(shown)
        yield "(" + "; ".join(f"{name} = {value}" for name, value in shown) + (f"; {more} more)" if more else ")")


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
