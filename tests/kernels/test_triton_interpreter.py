"""Our Triton kernels against float64 and each other, without a GPU."""

from pathlib import Path


def test_interpreted_kernels_are_right(interpreted):
    interpreted(Path(__file__).with_name("interpreted_triton.py"))
