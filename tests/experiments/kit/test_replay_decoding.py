"""How a run says that its requests are decoded, and what a user gets wrong."""

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, requests_of, workload_of
from kvarena.experiments.pagedattention.sharing_savings import savings
from kvarena.harness.record.metrics import summarize
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.run.published import differences

WASTE = ("experiment=memory_waste", "systems=[paged]", "arrival.duration_s=10")
SMALL = ("clock=measured", "device=cpu", "model=tiny-opt", "arrival.duration_s=0.05", "arrival.rate=200",
         "trace.max_tokens=64", "params.pool_bytes=1048576")  # fmt: skip


@pytest.mark.parametrize("clock", ["modelled", "measured"])
def test_a_run_says_how_its_requests_are_decoded(clock):
    options = (*SMALL, "params.pool_bytes=4194304") if clock == "measured" else ("trace=alpaca",)
    run = compose_run(*WASTE, *options, "decoding=parallel", "decoding.n=3")
    workload = workload_of(run)
    served = Replayer(run).serve(run.systems[0], workload)
    assert len(served.requests) == 3 * len(workload)
    assert served.requests.groupby("request_id").seq_id.count().eq(3).all()
    assert served.steps.shared_bytes.sum() > 0
    summary = summarize(served.requests, served.steps, served.resumed_gaps_ps)
    assert summary["finished"] == len(workload), "requests; latencies are of sequences"
    assert summary["rate_asked_per_s"] == pytest.approx(workload.rate)
    assert served.steps.preempted.sum() == 0
    assert served.steps.prefill_tokens.sum() == workload.prompt_tokens.sum(), "every prompt once"


def test_a_beam_shares_more_than_samples():
    run = compose_run(*WASTE)
    workload = workload_of(run)
    saved = [
        savings(Replayer(run).serve(run.systems[0], workload, DecodingConfig(name, 4)).steps)["saving"]
        for name in ("parallel", "beam")
    ]
    assert 0 < saved[0] < saved[1]


def test_a_mix_puts_every_method_into_one_batch():
    run = compose_run(*WASTE, *SMALL, "trace.mix={greedy: 0.4, n2: 0.3, n3-beam: 0.3}", "decoding.temperature=0.5")
    workload = workload_of(run)
    requests = requests_of(workload, run)
    methods = {(r.decoding.name, r.decoding.n, r.decoding.temperature) for r in requests}
    assert methods == {("greedy", 1, 1.0), ("parallel", 2, 0.5), ("beam", 3, 0.5)}
    served = Replayer(run).serve(run.systems[0], workload)
    assert set(served.requests.state) == {"finished"}


def test_another_way_of_decoding_is_not_the_published_run():
    for override, different in (
        ("decoding=greedy", []),
        ("decoding=beam", ["decoding"]),
        ("trace.mix={n2: 1.0}", ["trace"]),
    ):
        run = compose_run("experiment=memory_waste", override)
        assert differences(run, "fig2", "OPT-13B ShareGPT") == different


def test_without_a_run_requests_are_greedy():
    run = compose_run(*WASTE)
    assert {r.decoding for r in requests_of(workload_of(run))} == {GREEDY}


def test_a_shared_prefix_is_fed_once_for_all():
    run = compose_run(*WASTE, *SMALL, "trace=fixed", "trace.prompt_tokens=20", "trace.output_tokens=3")
    workload, prefix = workload_of(run), Prefix(-1, 13)
    fed = [
        Replayer(run).serve(run.systems[0], workload, prefix=prefix, share_prefix=share).steps.prefill_tokens.sum()
        for share in (True, False)
    ]
    assert fed == [7 * len(workload), 20 * len(workload)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoding=nucleus"], r"decoding=nucleus.*beam, greedy, parallel"),
        (["decoding=beam", "decoding.width=4"], r"decoding.width: no such key. There are: decoding.name, decoding.n"),
        (["decoding=beam", "decoding.n=0"], r"decoding.n=0: a beam's width is at least 1"),
        (["decoding.n=3"], r"decoding.n=3: greedy decoding yields one sequence"),
        (["decoding=parallel", "decoding.n=many"], r"decoding.n"),
    ],
)
def test_what_a_run_refuses(overrides, message):
    with pytest.raises(UserError, match=message):
        compose_run(*WASTE, *overrides)


def test_what_a_replay_refuses():
    run = compose_run(*WASTE, *SMALL, "decoding=beam", "decoding.n=300")
    with pytest.raises(UserError, match=r"beam.* 256"):
        Replayer(run).serve(run.systems[0], workload_of(run))
    run = compose_run(*WASTE, "trace.mix={n2: 0.7}")
    with pytest.raises(UserError, match=r"trace.mix.*sum to 1"):
        requests_of(workload_of(run), run)
    run = compose_run(*WASTE, *SMALL, "trace=fixed", "trace.prompt_tokens=20", "trace.output_tokens=3")
    with pytest.raises(UserError, match="does not reach past its prefix of 20"):
        Replayer(run).serve(run.systems[0], workload_of(run), prefix=Prefix(-1, 20))
    with pytest.raises(UserError, match=r"prefix of 65 .*context of 64"):
        Replayer(run).serve(run.systems[0], workload_of(run), prefix=Prefix(-1, 65))
