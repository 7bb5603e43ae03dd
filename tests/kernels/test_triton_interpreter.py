"""Our Triton kernels against float64 and each other, without a GPU.

Whether Triton interprets is settled when it is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

TOO_OLD = Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4")


@pytest.mark.skipif(TOO_OLD, reason="the interpreter of Triton before 3.7 needs numpy before 2.4")
def test_interpreted_kernels_are_right():
    script = Path(__file__).with_name("interpreted_triton.py")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
