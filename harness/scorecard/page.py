"""results/report.html: one page that carries its figures in itself and loads nothing."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvarena.harness.scorecard import figures, text
from kvarena.harness.scorecard.kept_runs import KeptRun
from kvarena.harness.scorecard.pairs import pair_drawing
from kvarena.harness.scorecard.scorecard import Scorecard

_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def page(card: Scorecard) -> str:
    """The whole page. It has no date: the same results give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": text.number, "slug": slug, "figure_name": text.figure_name, "image": image, "pair": pair_drawing,
        "published": text.published, "value": text.value_of, "evidence": text.evidence_of,
    }  # fmt: skip
    template = environment.get_template("page.html.jinja")
    return template.render(card=card, papers=text.PAPERS, rule=figures.RULE, origin=origin) + "\n"


def slug(name: object) -> str:
    """A name as an id: what is no letter, digit or dash becomes one."""
    return "".join(c if c.isalnum() else "-" for c in str(name).lower())


def image(path: Path) -> str:
    """A picture as a data: address."""
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def origin(run: KeptRun) -> dict[str, Any]:
    """What the page says of a run's provenance: command, code, machine, libraries, when."""
    record = run.provenance
    git, machine = record.get("git") or {}, record.get("machine") or {}
    commit = str(git.get("commit") or "not in git")[:12]
    return {
        "command": "./run.sh " + " ".join(map(str, record.get("command") or [])),
        "commit": commit + (" with uncommitted changes" if git.get("dirty") else ""),
        "machine": ", ".join(str(machine[key]) for key in ("gpu", "gpu_driver", "processor") if machine.get(key)),
        "cores": machine.get("cores"),
        "libraries": ", ".join(f"{name} {version}" for name, version in (record.get("libraries") or {}).items()),
        "written": record.get("written", ""),
    }
