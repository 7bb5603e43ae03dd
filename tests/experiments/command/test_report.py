"""The scorecard's page: whole in itself, its links lead somewhere, and a browser is content with it."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.report import write_report
from kvarena.harness.paths import PUBLISHED, RESULTS
from kvarena.harness.record.summary import frame, read_published, row
from kvarena.harness.scorecard.claims import load_claims

LOADING = {"src", "srcset", "poster", "data", "action", "background"}  # attributes that make a browser fetch something
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="30"><circle cx="15" cy="15" r="9"/></svg>'


def keep(results: Path, device: str, clock: str, experiment: str, figures: tuple[str, ...]) -> None:
    """A kept run whose numbers are 4 % above the published ones."""
    table = read_published(PUBLISHED)
    rows = [
        row(1.04 * r.value, experiment=experiment, paper=r.paper, figure=r.figure, panel=r.panel, system=r.system,
            setup="-", label="-", allocator="-", kernel="-", model="-", quantity=r.quantity,
            x=None if pd.isna(r.x) else r.x, unit=r.unit, clock=clock, device=device,
            evidence="predicted" if clock == "modelled" else "measured")
        for r in table[(table.paper == "pagedattention") & table.figure.isin(figures)].itertuples()
    ]  # fmt: skip
    folder = results / (device + ("-modelled" if clock == "modelled" else "")) / experiment
    folder.mkdir(parents=True)
    frame(rows).to_csv(folder / "summary.csv", index=False)
    (folder / "figure.svg").write_text(SVG)
    (folder / "provenance.json").write_text('{"command": ["experiment=<b>"], "machine": {"processor": "P&Q"}}')


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three kept runs, and the report of them."""
    folder = tmp_path_factory.mktemp("results")
    keep(folder, "a100-40gb", "modelled", "serving_latency", ("fig12a", "fig12b", "fig12c"))
    keep(folder, "a100-40gb", "modelled", "memory_waste", ("fig2",))
    keep(folder, "nvidia-h200", "measured", "attention_kernel", ("fig18a",))
    write_report(folder)
    return folder


class Page(HTMLParser):
    """Everything of a page that could be wrong."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids[given["id"]] += 1
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        self.loads += [value for name, value in attrs if name in LOADING or (name == "href" and tag != "a")]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def check_whole(folder: Path) -> Page:
    """Nothing is loaded, every id is there once, every link leads somewhere, every picture has words."""
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(value.startswith("data:") for value in page.loads)
    assert not re.search(r"url\(|@import", text)
    assert [name for name, count in page.ids.items() if count > 1] == []
    for link in page.links:
        assert link.removeprefix("#") in page.ids if link.startswith("#") else (folder / link).is_file(), link
    assert all(image["alt"] for image in page.images)
    assert set(page.ids) >= {claim.id for claim in load_claims()}
    return page


def test_the_page_is_whole(results):
    page = check_whole(results)
    assert len(page.images) == 3
    text = (results / "report.html").read_text()
    assert "P&amp;Q" in text
    assert "experiment=&lt;b&gt;" in text
    assert text.count('<figure class="pair">') >= 5
    assert "modelled on a100-40gb" in text


def test_the_same_results_give_the_same_bytes(results):
    before = [(results / name).read_bytes() for name in ("report.html", "SCORECARD.md")]
    write_report(results)
    assert [(results / name).read_bytes() for name in ("report.html", "SCORECARD.md")] == before


def test_the_scorecard_in_markdown(results):
    lines = (results / "SCORECARD.md").read_text().splitlines()
    rows = {
        cells[1].strip(): cells for line in lines if (cells := re.split(r"(?<!\\)\|", line))[0] == "" and len(cells) > 5
    }
    assert {claim.id for claim in load_claims()} <= set(rows)
    assert [cell.strip() for cell in rows["PA-11"][3:7]] == ["1.75 x", "1.755 x", "+0.3 %", "**holds**"]
    assert rows["PA-16"][3].strip() == "withheld"
    assert len({len(cells) for name, cells in rows.items() if re.match("[PV]A-", name)}) == 1
    assert any("PagedAttention Fig 12a" in line and "**holds**" in line for line in lines)
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(lines)):
        assert (results / target).is_file()


def test_nothing_kept_yet(tmp_path, capsys):
    write_report(tmp_path)
    check_whole(tmp_path)
    assert "60 claims, 0 kept runs: 2 holds" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*report.html"):
        write_report(tmp_path / "missing")


@pytest.mark.skipif(not (RESULTS / "report.html").is_file(), reason="no report is committed yet")
def test_the_committed_report():
    check_whole(RESULTS)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")

# Runs in the page, after it has loaded, and leaves what it saw in attributes of <body>.
PROBE = """
<script>addEventListener("load", () => {
  const images = [...document.images], broken = [...document.querySelectorAll('a[href^="#"]')].filter(
    (a) => !document.getElementById(a.getAttribute("href").slice(1)));
  for (const details of document.querySelectorAll("details")) details.open = true;
  Object.assign(document.body.dataset, {
    images: images.filter((i) => i.complete && i.naturalWidth > 0).length + "/" + images.length,
    drawings: [...document.querySelectorAll("figure.pair svg")].filter((s) => s.clientHeight > 50).length,
    broken: broken.length, wider: document.documentElement.scrollWidth - innerWidth > 1,
  });
});</script>
"""


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The page as the browser has it after loading, and what it wrote to its console."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}", "--enable-logging=stderr",
         "--virtual-time-budget=3000", "--dump-dom", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize("width", [1300, 500])
def test_the_page_in_a_browser(results, tmp_path, width):
    probed = tmp_path / "report.html"
    probed.write_text((results / "report.html").read_text() + PROBE)
    dom, console = browse(probed, tmp_path / "profile", f"--window-size={width},900")
    assert console == []
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    drawings = str((results / "report.html").read_text().count('<figure class="pair">'))
    assert seen == {"images": "3/3", "drawings": drawings, "broken": "0", "wider": "false"}


@needs_browser
def test_the_console_is_really_read(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><html><body><script>console.error('one'); missing()</script></body></html>")
    _, console = browse(page, tmp_path / "profile")
    assert len(console) == 2


@needs_browser
def test_the_stepped_view_in_a_browser(finished, tmp_path):
    folder = finished("memory_timeline", "trace.num_requests=4", "trace.max_tokens=128", "systems=[paged]")
    page = tmp_path / "steps.html"
    click = "<script>document.getElementById('on').click()</script>"
    page.write_text((folder / "steps.html").read_text() + click)
    dom, console = browse(page, tmp_path / "profile")
    assert console == []
    assert "step 2 of" in dom
    assert '<span class="dot"' in dom
