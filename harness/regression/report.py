"""The table that a person reads: Markdown, on the terminal and as the summary of a GitHub job."""

import os
from collections.abc import Iterable

from kvarena.harness.regression.verdict import Finding, Outcome, Status, Verdict

_SAID = {
    Status.OK: "ok",
    Status.REGRESSED: "REGRESSED",
    Status.UNJUDGEABLE: "cannot judge",
}

_ROWS = 60  # of one tier's table


def markdown(outcomes: Iterable[Outcome], status: Status) -> str:
    """The whole report."""
    sections = [f"## Regression gate: {_SAID[status]}", *map(_section, outcomes)]
    return "\n\n".join(sections) + "\n"


def _section(outcome: Outcome) -> str:
    if outcome.not_judged:
        return f"### {outcome.tier}: not judged\n\n{outcome.not_judged}"
    counts = {verdict: sum(f.verdict is verdict for f in outcome.findings) for verdict in Verdict}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [f"### {outcome.tier}: {said}", ""]
    if outcome.against:
        lines += [f"Against {outcome.against}.", ""]
    shown = [f for f in outcome.findings if f.verdict is not Verdict.OK or f.note]
    if shown:
        lines += ["| figure | base | head | change | verdict | note |", "|---|---:|---:|---:|---|---|"]
        lines += map(_row, sorted(shown, key=lambda f: f.verdict is Verdict.OK)[:_ROWS])
    if len(shown) > _ROWS:
        lines += ["", f"And {len(shown) - _ROWS} more."]
    return "\n".join(lines).rstrip()


def _row(finding: Finding) -> str:
    verdict = str(finding.verdict) if finding.verdict is Verdict.OK else f"**{finding.verdict}**"
    cells = (finding.figure, finding.base, finding.head, finding.change, verdict, finding.note)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def publish(text: str) -> None:
    """Print, and append to the job's summary where GitHub runs us."""
    print(text, end="")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(text)
