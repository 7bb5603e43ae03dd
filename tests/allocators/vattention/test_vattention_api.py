"""The paper's own interface: Table 4, driven by its Algorithm 1."""

import random
from collections import deque

import pytest
import torch

from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.api import VAttention
from kvarena.errors import UserError

N, B, L, H, D, P = 2, 4, 300, 2, 32, 4  # 256 bytes a token and tensor: 256 tokens fill 64 KB
PAIR = 2 * N * 64 * KB


def make(page_groups: int, **switches) -> tuple[VAttention, list[torch.Tensor]]:
    va = VAttention(page_groups * PAIR, **switches)
    return va, va.init(N, B, L, H, D, P, 64 * KB)


def test_init_returns_k_then_v_of_every_layer():
    va, tensors = make(4)
    assert [tuple(t.shape) for t in tensors] == [(B, L, H, D)] * 2 * N
    caches = [va.store.layer(n) for n in range(N)]
    assert [t.data_ptr() for t in tensors] == [c.k.data_ptr() for c in caches] + [c.v.data_ptr() for c in caches]
    va.close()
    va, tensors = make(4, tensor_slicing=True)
    assert [tuple(t.shape) for t in tensors] == [(B, L, N, H, D)] * 2
    va.close()


@pytest.mark.parametrize("switches", [{}, {"overlap": False, "eager_allocation": False}, {"tensor_slicing": True}])
def test_algorithm_1(switches):
    """Requests come and go; 4 long ones do not fit in 4 page-groups of every tensor, so that some are preempted."""
    rng = random.Random(0)
    va, tensors = make(4, **switches)
    layers = tensors if len(tensors) == 2 * N else [t[:, :, n] for t in tensors for n in range(N)]
    waiting = deque((i, rng.randrange(200, 270), rng.randrange(1, 30)) for i in range(12))  # id, prompt, output
    running: dict[int, tuple[int, int, int]] = {}
    lengths = [0] * B
    written = [0] * B
    finished, preemptions = [], 0

    def write(idx: int) -> None:
        request = running[idx][0]
        for t, tensor in enumerate(layers):
            for position in range(written[idx], lengths[idx]):
                tensor[idx, position] = request * 1000 + position + t / 8
        written[idx] = lengths[idx]

    def check(idx: int) -> None:
        request = running[idx][0]
        expected = request * 1000 + torch.arange(lengths[idx])[:, None, None].expand(-1, H, D)
        for t, tensor in enumerate(layers):
            assert torch.equal(tensor[idx, : lengths[idx]], expected + t / 8)

    while waiting or running:
        while waiting and len(running) < B:
            idx = va.alloc_reqid()
            running[idx] = waiting.popleft()
            lengths[idx], written[idx] = running[idx][1], 0
        while va.step(lengths) == -1:
            idx, request = running.popitem()  # the latest
            va.free_reqid(idx)
            lengths[idx] = 0
            waiting.appendleft(request)
            preemptions += 1
        for idx in list(running):  # forward()
            write(idx)
            check(idx)
        for idx, (request, prompt, output) in list(running.items()):
            if lengths[idx] == prompt + output:
                finished.append(request)
                lengths[idx] = 0
                va.free_reqid(idx)
                del running[idx]
            else:
                lengths[idx] += 1
    assert sorted(finished) == list(range(12))
    assert preemptions > 0
    va.close()


def test_a_request_id_is_a_row_and_comes_back():
    va, _ = make(8, eager_allocation=False)
    ids = [va.alloc_reqid() for _ in range(B)]
    assert sorted(ids) == list(range(B))
    with pytest.raises(ValueError, match="all 4 request ids are in use"):
        va.alloc_reqid()
    lengths = [0] * B
    lengths[ids[2]] = 300
    assert va.step(lengths) == 0
    va.free_reqid(ids[2])
    va.free_reqid(ids[1])
    assert va.alloc_reqid() == ids[2]  # deferred reclamation: the row with page-groups left
    va.close()


def test_after_minus_one_what_fits_is_backed():
    va, _ = make(2)
    ids = [va.alloc_reqid(), va.alloc_reqid()]
    lengths = [0] * B
    lengths[ids[0]] = lengths[ids[1]] = 257
    assert va.step(lengths) == -1
    va.free_reqid(ids[1])
    lengths[ids[1]] = 0
    assert va.step(lengths) == 0
    va.close()


def test_misuse():
    va, _ = make(2)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] = 5.* id 1 "):
        va.step([0, 5, 0, 0])
    with pytest.raises(KeyError):
        va.free_reqid(3)
    va.close()
    with pytest.raises(UserError, match="P=3 bytes per element: there are 2, 4"):
        VAttention(PAIR).init(N, B, L, H, D, 3, 64 * KB)
    with pytest.raises(UserError, match="page_group=100"):
        VAttention(PAIR).init(N, B, L, H, D, P, 100)
