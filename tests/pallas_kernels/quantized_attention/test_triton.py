"""The Triton kernels behind jax-triton, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kivi-jax[aot]'")
pytestmark = pytest.mark.aot

PARTS = 3  # of the cases, so that workers share them


@pytest.mark.parametrize("first", range(PARTS))
def test_interpreted_kernels_equal_xla(first):
    """Every case that the kernels do not refuse, within what float16 operands allow."""
    command = [
        sys.executable,
        "-m",
        "tests.pallas_kernels.quantized_attention.interpret_triton",
        str(PARTS),
        str(first),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    errors = {name: error for name, error in results.items() if isinstance(error, float)}
    assert len(errors) >= 4
    assert {name: error for name, error in errors.items() if error > 1e-3} == {}
