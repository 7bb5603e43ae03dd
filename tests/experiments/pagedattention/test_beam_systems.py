"""Systems that serve groups: rows for all that memory holds, and what is said where a pool holds no group."""

import re

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.pagedattention.parallel_sampling import with_rows
from kvarena.harness.requests.decoding import DecodingConfig

BEAMS = DecodingConfig("beam", n=4)


def beams_of(*overrides, rate=8.0):
    """A run of 20 s, and its workload at so many requests/s."""
    run = compose_run("experiment=beam_search", "arrival.duration_s=20", *overrides)
    return run, workload_of(run, rate=rate)


def test_rows_are_vattentions_alone():
    run, _ = beams_of("systems=[paged,vattention-2mb]")
    paged, rows = with_rows(run.systems, 1024)
    assert paged is run.systems[0]
    assert rows.allocator.max_rows == 1024
    assert list(with_rows(run.systems, None)) == list(run.systems)
    with pytest.raises(UserError, match=r"params.max_rows=0: must be 1 or more"):
        list(with_rows(run.systems, 0))


def test_more_rows_than_are_used_change_nothing():
    run, workload = beams_of("systems=[vattention-64kb]", rate=2.0)
    served = [Replayer(run).serve(system, workload, BEAMS) for n in (256, 1024) for system in with_rows(run.systems, n)]
    few, many = (frames.requests.drop(columns="system") for frames in served)
    assert few.equals(many)


def test_copied_beams_make_fewer_driver_calls_and_hold_more():
    run, workload = beams_of("systems=[vattention-64kb,vattention-64kb-copied]")
    mapped, copied = (Replayer(run).serve(system, workload, BEAMS).steps for system in run.systems)
    assert copied.stall_ps.sum() < mapped.stall_ps.sum() / 2
    shared = [(steps.shared_bytes.sum() / steps.live.sum()) for steps in (mapped, copied)]
    assert shared[1] < shared[0] / 2


def test_a_pool_that_holds_no_request():
    run, workload = beams_of("systems=[vattention-2mb]", f"params.pool_bytes={3 * 80 * 2**21}")
    message = f"vattention-2mb refuses all {len(workload)} requests; request 0: 4 x "
    with pytest.raises(UserError, match=re.escape(message)):
        Replayer(run).serve(run.systems[0], workload, BEAMS)
