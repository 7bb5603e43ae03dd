"""The vector operations, lane by lane."""

import math

import numpy as np
import torch

from kvarena.kernels import simd
from kvarena.kernels.jit import jit


@jit
def power_of_two(x, out):
    for i in range(0, len(x), 16):
        simd.store(out, i, simd.exp2(simd.load(x, i)))


@jit
def widen(x, out):
    for i in range(0, len(x), 16):
        simd.store(out, i, simd.load(x, i))


@jit
def sums_of_vectors(x, out):
    """Sum 16 vectors at once, as a square of scores does."""
    a = simd.fold4(simd.fold8(simd.load(x, 0), simd.load(x, 16)), simd.fold8(simd.load(x, 32), simd.load(x, 48)))
    b = simd.fold4(simd.fold8(simd.load(x, 64), simd.load(x, 80)), simd.fold8(simd.load(x, 96), simd.load(x, 112)))
    c = simd.fold4(simd.fold8(simd.load(x, 128), simd.load(x, 144)), simd.fold8(simd.load(x, 160), simd.load(x, 176)))
    d = simd.fold4(simd.fold8(simd.load(x, 192), simd.load(x, 208)), simd.fold8(simd.load(x, 224), simd.load(x, 240)))
    simd.store(out, 0, simd.fold1(simd.fold2(a, b), simd.fold2(c, d)))


@jit
def swaps(x, out):
    simd.store(out, 0, simd.swap8(simd.load(x, 0)))
    simd.store(out, 16, simd.swap4(simd.load(x, 0)))


def test_exp2_is_within_its_stated_error():
    x = -np.concatenate([np.linspace(0, 126, 160_000), np.arange(16)]).astype(np.float32)
    out = np.empty_like(x)
    power_of_two(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 1e-7


def test_exp2_at_its_edges():
    x = np.array([0, -0.0, -1, -126, -127, -128, -1e30, -math.inf, math.nan] + [0] * 7, np.float32)
    out = np.empty_like(x)
    power_of_two(x, out)
    assert out[:8].tolist() == [1, 1, 0.5, 2**-126, 0, 0, 0, 0]
    assert math.isnan(out[8])


def test_bfloat16_is_widened_exactly():
    x = torch.cat([torch.randn(64), torch.tensor([math.inf, -math.inf, 0.0, -0.0] * 4)]).to(torch.bfloat16)
    out = np.empty(len(x), np.float32)
    widen(x.view(torch.uint16).numpy(), out)
    assert np.array_equal(out, x.float().numpy())


def test_folds_sum_sixteen_vectors():
    x = np.random.default_rng(0).integers(0, 1000, (16, 16)).astype(np.float32)
    out = np.empty(16, np.float32)
    sums_of_vectors(x, out)
    assert np.array_equal(out, x.sum(axis=1))


def test_swaps_exchange_neighbouring_runs():
    out = np.empty(32, np.float32)
    swaps(np.arange(16, dtype=np.float32), out)
    assert out[:16].tolist() == [*range(8, 16), *range(8)]
    assert out[16:].tolist() == [*range(4, 8), *range(4), *range(12, 16), *range(8, 12)]
