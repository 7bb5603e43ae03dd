"""Claims: their file, their rules, and the verdicts on runs that are made up of known numbers."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.statistics import Estimate
from kvarena.harness.record.summary import SummaryRow, frame, read_published, row
from kvarena.harness.scorecard.claims import ARITHMETIC, CLAIMS, COLUMNS, load_claims
from kvarena.harness.scorecard.expression import evaluate, points_of
from kvarena.harness.scorecard.figures import compare, not_run
from kvarena.harness.scorecard.judge import Verdict, answered, judge
from kvarena.harness.scorecard.kept_runs import KeptRun, MissingPointError, Published, kept_runs
from kvarena.harness.scorecard.rule import Direction, Tolerance

TABLE = read_published(PUBLISHED)
THEIRS = Published(TABLE)
CLAIMED = {claim.id: claim for claim in load_claims()}
OURS_ALONE = {"PA-06", "VA-27", "VA-28"}  # counts, which no figure publishes


def a_row(paper, point, value, *, clock="modelled", device="a100-40gb", evidence="predicted", experiment="x"):
    unit = "%" if "share" in point.quantity else "s"
    return row(
        value, experiment=experiment, paper=paper, figure=point.figure, panel=point.panel, system=point.system,
        setup="-", label="-", allocator="-", kernel="-", model="-", quantity=point.quantity, x=point.x, unit=unit,
        clock=clock, device=device, evidence=evidence,
    )  # fmt: skip


def run_for(claim, change=lambda value, number: value, **given) -> KeptRun:
    """A run whose numbers are the published ones, changed."""
    given = {"experiment": claim.experiment} | given
    points = points_of(claim.expression)
    rows = [a_row(claim.paper, p, change(THEIRS.value(claim.paper, p), i), **given) for i, p in enumerate(points)]
    return KeptRun(Path(f"results/device/{given['experiment']}"), frame(rows))


def on(claim) -> dict[str, str]:
    """The clock and device of a run that settles the claim."""
    measured = claim.needs_gpu or claim.clock == "measured"
    return {"clock": "measured", "device": "nvidia-h200" if claim.needs_gpu else "cpu"} if measured else {}


def test_sixty_claims_and_a_name_for_each():
    assert len(CLAIMED) == 60
    assert sum(claim.published is None for claim in CLAIMED.values()) == 14
    assert {claim.paper for claim in CLAIMED.values()} == {"pagedattention", "vattention"}


@pytest.mark.parametrize("claim", CLAIMED.values(), ids=CLAIMED)
def test_the_papers_figures_yield_the_papers_claims(claim):
    """So an expression asks for the right values, and for published names."""
    if claim.published is None or claim.id in OURS_ALONE:
        with pytest.raises(MissingPointError):
            evaluate(claim.expression, lambda point: THEIRS.value(claim.paper, point))
    else:
        value = evaluate(claim.expression, lambda point: THEIRS.value(claim.paper, point))
        assert value == pytest.approx(claim.published, rel=0.01)


@pytest.mark.parametrize("claim", [c for c in CLAIMED.values() if c.published is not None], ids=lambda c: c.id)
def test_a_run_with_the_papers_numbers_holds_and_a_claim_without_a_run_is_not_run(claim):
    if claim.experiment == ARITHMETIC:
        assert judge(claim, [], THEIRS).verdict is Verdict.HOLDS
        return
    finding = judge(claim, [], THEIRS)
    assert (finding.verdict, finding.answer) == (Verdict.NOT_RUN, None)
    assert claim.experiment in finding.reason
    if claim.id not in OURS_ALONE:
        verdict = Verdict.DIRECTION if claim.tolerance.kind == "direction only" else Verdict.HOLDS
        assert judge(claim, [run_for(claim, **on(claim))], THEIRS).verdict is verdict


@pytest.mark.parametrize(
    ("factor", "verdict", "deviation"),
    [(1.0, "holds", "+0.3 %"), (0.85, "holds in direction", "-14.8 %"), (0.5, "does not hold", "-49.9 %")],
)
def test_a_ratio_that_is_off(factor, verdict, deviation):
    claim = CLAIMED["PA-11"]
    finding = judge(claim, [run_for(claim, lambda value, i: value * (factor if i == 0 else 1))], THEIRS)
    assert (finding.verdict, finding.deviation) == (verdict, deviation)
    assert finding.settled


def test_what_is_withheld_is_predicted():
    claim = CLAIMED["PA-16"]
    rows = [
        a_row(claim.paper, p, 2.0 + i, experiment=claim.experiment) for i, p in enumerate(points_of(claim.expression))
    ]
    finding = judge(claim, [KeptRun(Path("d/x"), frame(rows))], THEIRS)
    assert (finding.verdict, finding.deviation) == (Verdict.PREDICTED, "")
    assert finding.answer is not None
    assert finding.answer.value == pytest.approx(2 / 3)


def test_a_modelled_run_never_settles_what_is_to_be_measured():
    claim = CLAIMED["VA-03"]
    modelled = run_for(claim)
    finding = judge(claim, [modelled], THEIRS)
    assert finding.verdict is Verdict.NOT_RUN
    assert [other.source for other in finding.others] == ["modelled on a100-40gb; predicted"]
    on_cpu = run_for(claim, clock="measured", device="cpu", evidence="measured")
    assert judge(claim, [modelled, on_cpu], THEIRS).verdict is Verdict.DIRECTION
    on_gpu = run_for(claim, clock="measured", device="nvidia-h200", evidence="measured")
    assert judge(claim, [modelled, on_cpu, on_gpu], THEIRS).verdict is Verdict.HOLDS


@pytest.mark.parametrize("claim", [CLAIMED["VA-09"], CLAIMED["VA-03"]], ids=["modelled", "measured"])
def test_rows_that_earned_no_name_show_the_direction_at_most(claim):
    ours = run_for(claim, **on(claim)).summary.assign(paper="kvarena")
    finding = judge(claim, [KeptRun(Path("h200/x"), ours)], THEIRS)
    assert (finding.verdict, finding.settled) == (Verdict.DIRECTION, False)
    some = pd.concat([run_for(claim, **on(claim)).summary.iloc[:1], ours.iloc[1:]], ignore_index=True)
    finding = judge(claim, [KeptRun(Path("h200/x"), some)], THEIRS)
    assert not finding.settled, "one row that earned none is enough"


@pytest.mark.parametrize("claim", [claim for claim in CLAIMED.values() if claim.stand_in], ids=lambda claim: claim.id)
def test_the_kept_run_of_a_stand_in_answers(claim):
    experiment, expression = claim.stand_in
    (run,) = (run for run in kept_runs() if run.experiment == experiment and run.folder.parent.name == "cpu")
    answer = answered(claim, expression, run)
    assert answer.clock == "measured"
    assert answer.low <= answer.value <= answer.high


TWO = "q('fig8','m','{}/numba','decode_throughput_vs_batch',32)"
COMPARED = replace(  # a claim whose stand-in joins two measured numbers
    CLAIMED["VA-15"], stand_in=("decode_throughput", f"{TWO.format('vattention')}/{TWO.format('paged')}")
)


def stand_in(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> list[KeptRun]:
    """A CPU run with the two throughputs of that stand-in: median, low, high."""
    points = points_of(COMPARED.stand_in[1])
    rows = [
        replace(a_row("kvarena", p, m, clock="measured", device="cpu", evidence="measured",
                      experiment="decode_throughput"), n=8, ci_low=low, ci_high=high)
        for p, (m, low, high) in zip(points, (ours, theirs), strict=True)
    ]  # fmt: skip
    return [KeptRun(Path("results/cpu/decode_throughput"), frame(rows))]


def test_a_stand_in_shows_the_direction_at_most():
    finding = judge(COMPARED, stand_in((100, 99, 101), (100, 99, 101)), THEIRS)
    assert (finding.verdict, finding.settled) == (Verdict.DIRECTION, False)
    finding = judge(COMPARED, stand_in((150, 149, 151), (100, 99, 101)), THEIRS)
    assert finding.verdict is Verdict.FAILS


def test_what_is_too_coarse_is_undecided():
    for median in (100, 120):  # whichever side the median is on
        finding = judge(COMPARED, stand_in((median, 90, 150), (100, 99, 101)), THEIRS)
        assert finding.verdict is Verdict.UNDECIDED


def test_the_interval_of_a_ratio():
    answer = judge(COMPARED, stand_in((100, 97, 103), (100, 96, 104)), THEIRS).answer
    assert answer is not None
    assert answer.low == pytest.approx(1 - math.hypot(0.03, 1 - 1 / 1.04))
    assert answer.high == pytest.approx(1 + math.hypot(0.03, 1 / 0.96 - 1))


def test_two_rows_for_one_point_answer_nothing():
    claim = CLAIMED["PA-01"]
    once = run_for(claim).summary
    twice = pd.concat([once, once.assign(kernel="other")], ignore_index=True)
    finding = judge(claim, [KeptRun(Path("d/x"), twice)], THEIRS)
    assert finding.verdict is Verdict.NOT_RUN
    assert "several values" in finding.reason


@pytest.mark.parametrize(
    ("text", "met", "missed"),
    [
        ("abs 2", (8.0, 12.0), (7.9, 12.1)),
        ("rel 10 %", (9.1, 10.9), (8.9, 11.1)),
        ("factor 1.5", (6.7, 14.9), (6.6, 15.1, -10.0)),
        ("exact", (10.0,), (10.001,)),
        ("at most 11", (3.0, 11.0), (11.1,)),
        ("at least 9", (9.0, 99.0), (8.9,)),
        ("below 11", (10.9,), (11.0,)),
        ("direction only", (), (10.0,)),
    ],
)
def test_a_tolerance_around_ten(text, met, missed):
    tolerance = Tolerance.parse(text)
    assert [v for v in (*met, *missed) if tolerance.met(v, 10.0)] == list(met)
    assert tolerance.told("s")


def test_directions():
    assert [v for v in (0.9, 1.0, 1.1) if Direction.parse("> 1").met(v)] == [1.1]
    assert [v for v in (-1.0, 0.0) if Direction.parse("< 0").met(v)] == [-1.0]
    assert [v for v in (0.8, 1.0, 1.2) if Direction.parse("0.9 to 1.1").met(v)] == [1.0]
    assert Direction.parse("") is None
    with pytest.raises(UserError, match="none of"):
        Direction.parse("about 1")


GOOD = dict(zip(COLUMNS, ("PA-01", "pagedattention", "s1", "text", "2", "x", "e", "q('f','p','s','v')", "abs 1", "> 1",
                          "modelled", "no", "", ""), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": "near"}, "line 2: tolerance 'near': none of"),
        ({"direction": "up"}, "line 2: direction 'up'"),
        ({"published": "two"}, "line 2: could not convert"),
        ({"clock": "sundial"}, "line 2: clock 'sundial'"),
        ({"id": "first"}, "line 2: id 'first'"),
    ],
)
def test_a_claim_that_is_wrong_is_named_by_file_and_line(tmp_path, change, message):
    path = tmp_path / "claims.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow(GOOD | change)
    with pytest.raises(UserError, match=f"claims.csv: {message}"):
        load_claims(path)


def test_files_that_are_no_claims(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_claims(tmp_path / "claims.csv")
    (tmp_path / "claims.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="line 1: the columns"):
        load_claims(tmp_path / "claims.csv")
    (tmp_path / "claims.csv").write_text(CLAIMS.read_text() + CLAIMS.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match="more than one claim is called PA-01"):
        load_claims(tmp_path / "claims.csv")


def figure_rows(figure: str, change=lambda value: value) -> KeptRun:
    rows = TABLE[(TABLE.paper == "pagedattention") & (TABLE.figure == figure)]
    ours: list[SummaryRow] = [
        row(Estimate(change(r.value), 1, math.nan, math.nan), experiment="e", paper=r.paper, figure=r.figure,
            panel=r.panel, system=r.system,
            setup="-", label="-", allocator="-", kernel="-", model="-", quantity=r.quantity,
            x=None if pd.isna(r.x) else r.x, unit=r.unit, clock="modelled", device="a100-40gb", evidence="calibrated")
        for r in rows.itertuples()
    ]  # fmt: skip
    return KeptRun(Path("a100-40gb-modelled/e"), frame(ours))


def test_figures_by_ratio_and_by_points():
    curve, rate = (c for c in compare(figure_rows("fig12a", lambda v: 1.08 * v), TABLE) if "second" not in c.quantity)
    assert (curve.verdict, curve.alike, len(curve.points)) == (Verdict.HOLDS, 1.0, 28)
    assert curve.error == pytest.approx(8.0)
    assert rate.quantity == "rate_at_0.5_s_per_token"
    assert compare(figure_rows("fig12a", lambda v: 2 * v), TABLE)[0].verdict is Verdict.DIRECTION
    assert compare(figure_rows("fig12a", lambda v: 1 / v), TABLE)[0].verdict is Verdict.FAILS
    [bars] = compare(figure_rows("fig2", lambda v: v + 2), TABLE)
    assert (bars.in_points, bars.verdict, bars.deviation) == (True, Verdict.HOLDS, "2 points")
    assert compare(figure_rows("fig12a", lambda v: -v), TABLE)[0].error == math.inf


def test_published_figures_that_nobody_ran():
    missing = not_run(compare(figure_rows("fig12a"), TABLE), TABLE)
    assert ("pagedattention", "fig12a") not in missing
    assert ("pagedattention", "fig2") in missing
    assert ("vattention", "fig8") in missing


def test_folders_of_kept_runs(tmp_path):
    for name in ("cpu/e", "runs/e", "published/e", "baselines/e"):
        (tmp_path / name).mkdir(parents=True)
        figure_rows("fig2").summary.to_csv(tmp_path / name / "summary.csv", index=False)
    [run] = kept_runs(tmp_path)
    assert (run.name, run.clock, run.devices, run.provenance) == ("cpu/e", "modelled", ["a100-40gb"], {})
    (tmp_path / "cpu" / "e" / "summary.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the columns experiment"):
        kept_runs(tmp_path)
    (tmp_path / "cpu" / "e" / "summary.csv").write_text("")
    with pytest.raises(UserError, match="cannot be read as a finished run"):
        kept_runs(tmp_path)


def test_the_clock_is_that_of_the_rows_and_not_of_the_run():
    """A measured run may carry modelled rows."""
    claim = CLAIMED["VA-04"]
    modelled = run_for(claim)
    measured = a_row(
        "kvarena", points_of(claim.expression)[0], 1.0, clock="measured", device="cpu", experiment=claim.experiment
    )
    both = KeptRun(modelled.folder, pd.concat([frame([measured]), modelled.summary], ignore_index=True))
    finding = judge(claim, [both], THEIRS)
    assert (finding.verdict, both.clock) == (Verdict.HOLDS, "measured and modelled")
    assert finding.answer is not None
    assert finding.answer.source == "modelled on a100-40gb; predicted"


def test_a_histogram_counts_records_in_other_bins():
    _, bins = (c for c in compare(figure_rows("fig11"), TABLE))
    assert (bins.unit, bins.error) == ("records", 0)
    moved = bins.points["published"].iloc[0]
    _, emptied = compare(figure_rows("fig11", lambda v: 0.0 if v == moved else v), TABLE)
    assert emptied.error == pytest.approx(50 * moved / bins.points["published"].sum(), rel=1e-6)
