"""Table 1 and Fig 16: a kernel that passes, one that computes something else, one that crashes; shares; the lag."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.vattention import portability
from kvarena.experiments.vattention.portability import OUTCOMES, Pair, read_releases
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import get_kernel, kernel_spec

SMALL = ("experiment=portability", "device=cpu", "model=tiny-llama", "params.pool_bytes=8388608")


class Odd(AttentionKernel):
    """Right where it prefills, anything else where it decodes."""

    spec = kernel_spec("numba")

    def __init__(self, decode: Callable[..., None]) -> None:
        self.kernel, self.odd = get_kernel("numba"), decode

    def prefill(self, q, cache, view, out):
        self.kernel.prefill(q, cache, view, out)

    def decode(self, q, cache, view, out):
        self.odd(q, cache, view, out)


def crash(*_: object) -> None:
    raise ValueError("no such stride")


@pytest.mark.parametrize(
    ("decode", "outcome", "why"),
    [
        (get_kernel("numba").decode, "passes", ""),
        (lambda q, cache, view, out: out.zero_(), "fails", ""),
        (lambda q, cache, view, out: None, "fails", ""),  # leaves the output as it was: NaN
        (crash, "fails", "ValueError: no such stride"),
    ],
)
def test_what_a_kernel_computes_decides(decode, outcome, why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portability, "get_kernel", lambda name: Odd(decode))
    run = compose_run(*SMALL)
    for allocator in ("static", "paged", "vattention", "orca_pow2"):
        assert portability._outcome(run, Pair(allocator, "numba"))[::2] == (outcome, why), allocator


def test_what_cannot_be_tried_is_no_failure() -> None:
    run = compose_run(*SMALL)
    assert portability._outcome(run, Pair("paged", "sdpa"))[0] == "reads another layout"
    assert portability._outcome(run, Pair("vattention", "triton"))[0] == "not here"


def test_every_kernel_of_static_memory_runs_on_demand(
    summary_of: Callable[..., pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portability, "kernel_names", lambda: ["numba", "sdpa", "gather_sdpa", "fa3"])
    summary = summary_of("portability", *SMALL[1:])
    share = summary[summary.quantity == "share_of_contiguous_kernels_that_run"].set_index("system").value
    assert share.to_dict() == {"vattention": 100, "paged": 50}
    outcome = summary[summary.quantity == "outcome"].set_index("system").value.map(lambda i: OUTCOMES[int(i)])
    assert outcome["vattention/sdpa"] == outcome["paged/gather_sdpa"] == "passes"
    assert outcome["paged/sdpa"] == "reads another layout"
    assert outcome["static/fa3"] == "not here"


def test_paging_never_came_first() -> None:
    releases = read_releases()
    assert (releases.lag_months >= 0).all()
    assert releases.set_index("library").lag_months["FlashAttention 3"] == 4
    assert releases[["source", "certainty"]].notna().all(axis=None)


def test_the_claim_is_of_any_device_and_model(summary_of: Callable[..., pd.DataFrame], monkeypatch) -> None:
    monkeypatch.setattr(portability, "kernel_names", lambda: ["sdpa"])
    summary = summary_of("portability", *SMALL[1:])
    [row] = summary[(summary.paper == "vattention") & (summary.system == "vattention")].to_dict("records")
    assert (row["figure"], row["panel"], row["setup"]) == ("table1", "kernels", "tiny-llama, kernels, 1 x cpu")
    assert set(summary[summary.paper == "kvarena"].figure) == {"portability"}


def test_a_pool_without_room_is_the_users_mistake_and_no_failure_of_a_kernel() -> None:
    with pytest.raises(UserError, match=r"params\.pool_bytes=.*has no room"):
        portability._outcome(compose_run(*SMALL, "params.pool_bytes=131072"), Pair("static", "sdpa"))


@pytest.mark.parametrize("key", ["systems=[paged]", "arrival.rate=3", "model.ffn_size=8", "allocator.block_size=8"])
def test_keys_that_no_pair_reads_are_refused(key: str) -> None:
    with pytest.raises(UserError):
        compose_run(*SMALL, key)


@pytest.mark.parametrize("override", ["params.prompts=[]", "params.prompts=[256]", "params.max_tokens=0"])
def test_what_cannot_be_is_refused(override: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=override.split("=")[0]):
        summary_of("portability", *SMALL[1:], override)
