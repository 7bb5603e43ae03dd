"""Nothing of a trace is lost in silence: whose filter and arrivals are applied, what is counted, what is told."""

import csv
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kvarena.harness.accounts import replays, told
from kvarena.harness.accounts.trace_account import TraceAccount, account_of
from kvarena.harness.config import load, typed
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig, load_trace, published_files
from kvarena.harness.trace.arrival import ArrivalConfig
from kvarena.harness.trace.file_arrivals import ASKED, chosen_arrivals
from kvarena.harness.trace.published_files import filter_of, is_published

ARTIFACT = ArrivalConfig("artifact", rate=4.0, duration_s=900)
PROMPT, LONG = 863, 2000  # tokens, and 100 of output: 963, and 2100


def named(trace: str = "sharegpt", **fields: object) -> TraceConfig:
    return typed(TraceConfig, {**load("trace", trace), **fields}, "trace")


def write(path: Path, long: int, short: int, timed: bool = False) -> str:
    """A file of `long` requests that a context of 2048 does not hold, then `short` that it does, one a second."""
    lengths = [LONG] * long + [PROMPT] * short
    rows = [f"{second},{prompt},100" if timed else f"{prompt},100" for second, prompt in enumerate(lengths)]
    header = "arrival_s,prompt_tokens,output_tokens" if timed else "prompt_tokens,output_tokens"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """The seen file: 3000 records, 354 of them over 2048 tokens."""
    return write(tmp_path / "own.csv", 354, 2646)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that is listed as sharegpt's: one request over 2048, one of 2048, two below."""
    path = tmp_path / "paper.csv"
    path.write_text("prompt_tokens,output_tokens\n2000,100\n2000,48\n863,100\n700,50\n")
    table = tmp_path / "trace_files.csv"
    with table.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["sha256", "trace", "records", "source"])
        lines.writerow([hashlib.sha256(path.read_bytes()).hexdigest(), "sharegpt", 4, "a test"])
    monkeypatch.setattr(published_files, "TRACE_FILES", table)
    return str(path)


def test_the_seen_file(own: str) -> None:
    workload = make_workload(named(path=own), ARTIFACT, 2048, "the experiment's")
    account = workload.account
    assert account is not None
    assert (account.read, account.dropped, account.kept) == (3000, {"over 2048": 354}, 2646)
    assert (account.served, account.rounds, account.asked) == (len(workload), 2, len(workload))
    assert account.mean_prompt_tokens == PROMPT
    line = str(account)
    assert f"3000 read, 354 over 2048 dropped (filter fits_context), repeated to {len(workload)} (2 rounds), " in line
    assert line.endswith("arrivals: artifact, 4/s for 900 s (the experiment's)")
    assert workload.provenance["account"]["dropped"] == {"over 2048": 354}
    assert workload.provenance["account"]["arrivals"]["config"]["seed"] == 0
    assert account.quantities() == {
        "requests_read": (3000, "records"),
        "requests_dropped": (354, "records"),
        "requests_served": (len(workload), "requests"),
        "mean_prompt_tokens": (PROMPT, "tokens"),
        "mean_output_tokens": (100, "tokens"),
        "requests_repeated": (len(workload) - 2646, "requests"),
    }


def test_every_record_is_dropped_by_a_rule_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text("prompt_tokens,output_tokens\n9,0\n2000,48\n1000,100\n600,9\n20,5\n30,5\n")
    config = named(path=str(path), filter="paper_artifact", on_bad_record="skip", num_requests=2, cut_prompt=500)
    account = account_of(config, load_trace(config, 550))
    assert account.dropped == {"malformed": 1, "over 550": 1}
    assert account.cut == {"prompts cut to 500": 2}
    assert account.read == 6 == sum(account.dropped.values()) + (account.kept or 0)
    assert "first 2 of 4 taken" in str(account)


def test_a_papers_filter_is_of_its_table_and_of_listed_files(own: str, listed: str) -> None:
    assert filter_of(named(), 2048) == "paper_artifact"
    assert filter_of(named(path=listed), 2048) == "paper_artifact"
    assert filter_of(named(path=own), 2048) == "fits_context"
    assert filter_of(named(path=own), None) == "none", "nothing has to fit"
    assert filter_of(named(path=own, filter="paper_artifact"), 2048) == "paper_artifact", "asked for"
    assert filter_of(named(path=listed, filter="none"), 2048) == "none", "asked for"
    assert filter_of(named("sharegpt_v3", path=listed), 2048) == "fits_context", "listed for another trace"
    assert not is_published(named(table="azure_code")), "another table"
    assert not is_published(named("vattention_online")), "lengths that are made up"
    assert not is_published(TraceConfig(table="sharegpt"))


def test_a_file_is_known_by_its_content(listed: str) -> None:
    before = account_of(named(path=listed), load_trace(named(path=listed), 2048))
    assert before.dropped == {"by paper_artifact": 2}
    assert str(before).count("paper_artifact") == 1
    with Path(listed).open("a") as file:
        file.write("1,1\n")
    after = account_of(named(path=listed), load_trace(named(path=listed), 2048))
    assert (after.filter, after.dropped, after.kept) == ("fits_context", {"over 2048": 1}, 4)


def test_a_small_pool_leaves_out_of_the_papers_data_too(listed: str) -> None:
    config = named(path=listed, max_tokens=800)
    account = account_of(config, load_trace(config, 2048))
    assert account.dropped == {"by paper_artifact": 2, "over 800": 1}
    assert account.kept == 1


def test_tables_say_what_they_are_cut_to() -> None:
    config = named(num_requests=300, max_tokens=512)
    account = account_of(config, load_trace(config, 2048))
    assert (account.read, account.limit, account.served) == (None, 512, 300)
    assert account.cut["cut to 512 in all"] == load_trace(config, 2048).provenance["cut"] > 0
    assert "300 drawn within 512 tokens (filter paper_artifact)" in str(account)
    assert set(account.quantities()) == {"requests_served", "mean_prompt_tokens", "mean_output_tokens", "lengths_cut"}
    assert account_of(named("alpaca"), load_trace(named("alpaca"))).limit is None
    chat = named("sharegpt_chat", num_requests=300)
    assert account_of(chat, load_trace(chat, 2048)).cut["prompts cut to 1024"] > 0


@pytest.mark.parametrize(
    ("trace", "arrival", "overrides", "process", "by"),
    [
        ({"timed": True}, ARTIFACT, [], "recorded", "the file's own"),
        ({"timed": True}, ARTIFACT, ["trace.seed=1"], "recorded", "the file's own"),
        ({"timed": True}, ARTIFACT, ["arrival=artifact"], "artifact", ASKED),
        ({"timed": True}, ARTIFACT, ["++arrival.rate=4"], "artifact", ASKED),
        ({"timed": True}, ARTIFACT, ["arrival.process=artifact", "arrival.duration_s=9"], "artifact", ASKED),
        ({"timed": True}, ARTIFACT, ["arrival.duration_s=900"], "recorded", "the file's own"),
        ({"timed": False}, ARTIFACT, ["arrival.duration_s=900"], "artifact", "records none"),
        ({"timed": False}, ARTIFACT, [], "artifact", "records none"),
        ({"timed": True, "num_requests": 9}, ARTIFACT, [], "artifact", "fewer requests"),
        ({"timed": True}, replace(ARTIFACT, rate=None), [], "artifact", "axis"),
        ({"timed": True}, ArrivalConfig("all_at_once"), [], "all_at_once", "draws none"),
    ],
)
def test_a_files_own_arrivals(tmp_path: Path, trace, arrival, overrides, process, by) -> None:
    path = write(tmp_path / "own.csv", 1, 4, trace.pop("timed"))
    chosen = chosen_arrivals(named(path=path, **trace), arrival, overrides, 2048)
    assert chosen.arrival.process == process
    assert by in chosen.by
    if process != "recorded":
        assert chosen.arrival == arrival


def test_recorded_arrivals_are_the_whole_files(tmp_path: Path) -> None:
    config = named(path=write(tmp_path / "own.csv", 1, 4, timed=True))
    chosen = chosen_arrivals(config, ARTIFACT, [], 2048)
    workload = make_workload(config, chosen.arrival, 2048, chosen.by)
    assert workload.arrival_s.tolist() == [1, 2, 3, 4], "the first is over long"
    assert str(workload.account).endswith("arrivals: recorded, over 4 s (the file's own)")


def test_a_duration_alone_cuts_the_files_own_arrivals_and_the_account_says_so(tmp_path: Path) -> None:
    config = named(path=write(tmp_path / "own.csv", 0, 6, timed=True))
    chosen = chosen_arrivals(config, replace(ARTIFACT, duration_s=2.5), ["arrival.duration_s=2.5"], 2048)
    workload = make_workload(config, chosen.arrival, 2048, chosen.by)
    assert workload.arrival_s.tolist() == [0, 1, 2]
    line = str(workload.account)
    assert "6 read, none dropped (filter fits_context), 3 beyond arrival.duration_s=2.5 left out, " in line
    assert line.endswith("arrivals: recorded, over 2 s (the file's own)")


def test_the_first_taken_are_the_files_first_and_a_cut_by_duration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "falling.csv"
    rows = [f"{30 - number},{number},9" for number in range(1, 31)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    config = named(path=str(path), num_requests=20)
    workload = make_workload(config, ArrivalConfig("recorded", duration_s=12), 2048)
    assert workload.prompt_tokens.tolist() == [20, 19], "the last of those taken come first"
    assert "first 20 of 30 taken, 18 beyond arrival.duration_s=12 left out, mean" in str(workload.account)
    assert workload.account is not None
    assert workload.account.quantities()["requests_left_out"] == (18, "requests")


def test_the_papers_data_keeps_the_experiments_arrivals(listed: str) -> None:
    for config in (named(), named(path=listed), named("vattention_online")):
        assert chosen_arrivals(config, ARTIFACT, [], 2048) == (ARTIFACT, "the experiment's")
    assert chosen_arrivals(named(path="someone/trace"), ARTIFACT, [], 2048).arrival == ARTIFACT


def account_at(path: str, rate: float, seed: int = 0) -> TraceAccount:
    account = make_workload(named(path=path, seed=seed), replace(ARTIFACT, rate=rate), 2048).account
    assert account is not None
    return account


def test_a_trace_is_told_once_at_whatever_rate_and_seed(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    told.forget()
    for rate, seed in ((1.0, 0), (2.0, 0), (2.0, 1)):
        told.tell(account_at(own, rate, seed))
    assert capsys.readouterr().err.count("\n") == 1
    for config in (named("alpaca"), named(path=own, filter="paper_artifact")):
        told.told(config, load_trace(config, 4096))
    assert capsys.readouterr().err.count("\n") == 2
    told.forget()
    assert "account" in told.told(named(path=own), load_trace(named(path=own), 2048)).provenance
    assert "3000 read" in capsys.readouterr().err


def test_a_replay_that_repeats_more_is_told_and_all_of_them_are_counted(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told.forget()
    with told.heard() as outer:
        for rate in (1.0, 4.0, 2.0, 10.0):
            with told.heard() as inner:
                told.tell(account_at(own, rate))
            assert len(inner) == 1
            told.tell(inner[0])  # as a cell that is read back does
    lines = capsys.readouterr().err.splitlines()
    assert ["rounds" in line for line in lines] == [False, True, True], "2/s repeats nothing, 10/s more than 4/s"
    [replayed] = replays.by_trace(outer)
    assert [account.rounds for account in replayed] == [1, 2, 1, 4]
    served = [account.served for account in replayed]
    found = replays.quantities(replayed)
    assert found["requests_read"] == (3000, "records")
    assert found["requests_served:smallest"] == (min(served), "requests")
    assert found["requests_served:largest"] == (max(served), "requests")
    assert found["requests_repeated:smallest"] == (0, "requests")
    assert found["requests_repeated:largest"] == (max(served) - 2646, "requests")
    line = replays.said(replayed)
    assert line.startswith(f"{lines[0]}; over all replays: ")
    assert f"requests served {min(served)} to {max(served)}" in line
    assert replays.said(replayed[:1]) == lines[0]
    assert replays.quantities(replayed[:1]) == replayed[0].quantities()


def test_an_account_is_the_same_when_it_is_read_back(own: str) -> None:
    alone = account_of(named("alpaca"), load_trace(named("alpaca")))
    for account in (account_at(own, 4.0), alone):
        assert TraceAccount.of_plain(json.loads(json.dumps(asdict(account), default=int))) == account


def test_lengths_drawn_within_another_context_are_told_apart() -> None:
    accounts = [account_of(named(), load_trace(named(), context)) for context in (512, 2048)]
    assert len(replays.by_trace(accounts)) == 2
