"""The Triton kernels of a GPU, on the CPU in Triton's interpreter (tests/test_gpu.py has them on a GPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import training_models


@pytest.mark.slow
def test_kernels_agree_with_the_reference():
    pytest.importorskip("triton")
    program = Path(__file__).parent / "support" / "row_kernel_cases.py"
    environment = {**os.environ, "PYTHONPATH": str(training_models.ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True,
        timeout=training_models.PATIENCE,
    )  # fmt: skip
    assert done.stdout == "4 cases agree\n", done.stderr
