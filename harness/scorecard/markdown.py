"""results/SCORECARD.md: the claims and figures as tables, for readers of the repository."""

from collections.abc import Iterable, Iterator

from kvarena.harness.scorecard import figures, text
from kvarena.harness.scorecard.scorecard import Scorecard


def markdown(card: Scorecard) -> str:
    """The whole file. It has no date: the same results give the same text."""
    return "\n".join([*_head(card), *_claims(card), *_figures(card)]) + "\n"


def _head(card: Scorecard) -> Iterator[str]:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in card.counts.items())
    yield "# Scorecard"
    yield ""
    yield f"{len(card.findings)} claims of two papers: {counts}. Written by `./run.sh report` from the runs kept in"
    yield "`results/`; `report.html` beside it has the figures. `./run.sh claim=ID` measures one claim anew."
    yield ""
    yield "A claim *holds* within its tolerance, *holds in direction* where only the direction named is right, and is"
    yield "*predicted* where the published value is withheld. Modelled and fitted (*calibrated*) numbers say so."


def _claims(card: Scorecard) -> Iterator[str]:
    for paper, title in text.PAPERS.items():
        rows = (
            (
                f.claim.id, f"{f.claim.text} ({f.claim.section})", text.published(f.claim),
                "" if f.answer is None else text.value_of(f.answer, f.claim.unit), f.deviation, f"**{f.verdict}**",
                f.claim.rule, text.evidence_of(f) + (f". {f.claim.note}" if f.claim.note else ""),
            )
            for f in card.findings
            if f.claim.paper == paper
        )  # fmt: skip
        yield f"\n## {title}: claims\n"
        yield from _table(("id", "claim", "published", "here", "deviation", "verdict", "rule", "evidence"), rows)


def _figures(card: Scorecard) -> Iterator[str]:
    rows = (
        (
            f"{text.PAPERS[c.paper].split(' ')[0]} {text.figure_name(c.figure)}", c.quantity.replace("_", " "),
            f"[{run.name}]({run.name}/summary.csv)", str(len(c.points)), c.deviation,
            "" if c.alike != c.alike else f"{100 * c.alike:.0f} %", f"**{c.verdict}**",
        )
        for run in card.runs
        for c in card.compared[run.name]
    )  # fmt: skip
    yield "\n## Figures\n"
    yield f"{figures.RULE[0].upper()}{figures.RULE[1:]}.\n"
    yield from _table(("figure", "quantity", "run", "points", "RMS error", "pairs alike", "verdict"), rows)
    missing = ", ".join(f"{paper} {text.figure_name(figure)}" for paper, figure in card.figures_not_run)
    yield f"\nPublished, and no kept run has a point of it: {missing or 'none'}."


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    heads = list(heads)
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for row in rows:
        yield _line(row)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
