"""The Mosaic kernel: races, and lowering for an H100 (compiling it needs jax's CUDA plugin)."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from pallas_kernels.quantized_attention import pallas_mosaic
from pallas_kernels.quantized_attention.cases import CORRECTNESS
from tests.draws import dense

pytestmark = pytest.mark.skipif(
    not hasattr(pallas_mosaic.plgpu, "InterpretGPUParams"), reason="the kernel needs jax 0.11 or later"
)


def interpret(name):
    """Run a case, two tiles in flight; the interpreter raises where it sees a race."""
    (case,) = [c for c in CORRECTNESS if c.name == name]
    query, *tokens = dense(case)
    query, (start, end) = query.astype(case.query_dtype), case.token_ranges()
    key, value = jax.jit(case.pack)(*tokens)
    tuning = pallas_mosaic.Tuning(splits=1, pages=2)
    attend = functools.partial(pallas_mosaic.attend, scale=1.0, tuning=tuning, interpret=True)
    jax.block_until_ready(jax.jit(attend)(query, key, value, start=start, end=end))


@pytest.mark.parametrize("name", ["tiles_wrapped", "tiles_empty_row"])
def test_copies_and_reads_do_not_race(name):
    interpret(name)


def test_a_race_would_be_seen(monkeypatch):
    monkeypatch.setattr(pallas_mosaic.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        interpret("tiles_empty_row")


def modules(*arguments):
    """Sizes of the modules of cases, made in another process; none was refused."""
    command = [sys.executable, "-m", "tests.pallas_kernels.quantized_attention.lower_mosaic", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if "--compile" in arguments:
        environment.pop("JAX_PLATFORMS")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert {name: size for name, size in sizes.items() if not isinstance(size, int)} == {}
    return sizes


def test_lowers_for_an_h100():
    names = ["2 bits", "2 bits, groups 128", "2 bits, H 64"]
    if hasattr(pallas_mosaic.plgpu, "store"):  # from jax 0.12 on
        names += ["2 bits, H 256", "4 bits", "8 bits"]
    assert set(modules(*names)) == set(names)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="compiling for an H100 needs JAX's CUDA plugin: pip install 'kivi-jax[cuda]'",
)
def test_compiles_for_an_h100():
    assert set(modules("--compile", "2 bits", "2 bits, H 64")) == {"2 bits", "2 bits, H 64"}
