"""Reading XLA's programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kivi_jax.bench import compiled
from kivi_jax.cache.decode_selectors import Slide
from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.pool import TokenPool
from kivi_jax.cache.segments import Step
from kivi_jax.cache.stores import Given
from kivi_jax.plan.shapes import SHAPES

# As XLA prints a program for a GPU, shortened.
PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[4,8]{1,0})->(u8[4]{0}, pred[])}

%fused (p: f32[4,8]) -> u8[4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %c = u8[4]{0} convert(%p)
}

ENTRY %main.8 (x.1: f32[4,8]) -> (u8[4], pred[]) {
  %x.1 = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %both = (u8[4]{0}, pred[]) fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="a(b)/c"}
  %first = u8[4]{0} get-tuple-element(%both), index=0
  %copy.1 = u8[4]{0} copy(%first)
  %call = bf16[2,2]{1,0} custom-call(%copy.1, %x.1), custom_call_target="triton_kernel_call"
  ROOT %tuple = (u8[4]{0}, pred[]) tuple(%copy.1, %first)
}
"""


def test_launches_of_a_program():
    assert compiled.launches(PROGRAM) == [
        ("both", "fusion", 128 + 4 + 1),
        ("copy.1", "copy", 4 + 4),
        ("call", "custom-call", 4 + 128 + 8),
    ]


def test_reads_what_the_installed_xla_prints():
    """On the CPU, where elementwise work becomes one fusion that reads once and writes once."""
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    program = compiled.compile_for(jax.devices("cpu")[0], jax.jit(lambda x: jnp.sin(x) * x + 1), x)
    (launch,) = compiled.launches(program)
    assert launch.kind == "fusion"
    assert launch.bytes == 2 * 4 * 1024


def test_packing_is_a_few_kernels_and_reads_a_prompt_twice():
    """What XLA makes of it on the machine that runs the tests: no float copy of the prompt is written."""
    for record in compiled.packing(jax.devices("cpu")[0], tokens=1024):
        prompt = 2 * 8 * 1024 * 128
        assert record["implementation"] == "xla"
        assert record["least_bytes"] == prompt * 19 // 16  # 2 bits and 16-bit scales and zeros of 32 codes
        assert record["kernels"] <= 12


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # said at lowering
def test_the_kernel_is_one_launch_that_reads_once_and_writes_once():
    try:
        device = compiled.described_gpu()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    records = [r for r in compiled.packing(device, tokens=1024) if r["implementation"] == "pallas_triton"]
    assert [record["what"] for record in records] == ["keys", "values"]
    for record in records:
        assert (record["kernels"], record["bytes"]) == (1, record["least_bytes"])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_a_pools_step_asks_twice_and_attends_once():
    """Attending and appending both need the scores; no copy of keys or values is made for either."""
    try:
        device = compiled.described_gpu()
    except NotImplementedError as reason:
        pytest.skip(str(reason))

    def step(pool, query, token, active):
        attended = pool.attend(query)
        taken = pool.append(Step(query, token, token, attended.log_sum_exp, active))
        return attended.out, taken

    token = jnp.zeros((2, 8, 128), jnp.bfloat16)
    given = Given(token[:, :, None][:, :, :0], token[:, :, None][:, :, :0], jnp.zeros((2, 8, 0), jnp.int32))
    pool = TokenPool.of(given, jnp.zeros(2, jnp.int32), selector=Slide())
    arguments = (pool, jnp.zeros((2, 32, 128), jnp.bfloat16), token, jnp.ones(2, bool))
    found = compiled.launches(compiled.compile_for(device, jax.jit(step, donate_argnums=0), *arguments))
    assert sum(launch.kind == "custom-call" for launch in found) == 2
    assert not [launch for launch in found if launch.kind == "copy" and launch.bytes > 1024]


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"kivi-jax\[cuda\]"):
        compiled.described_gpu()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # said at lowering
def test_turned_keys_and_first_tokens_launch_nothing_more():
    """Nor does a layer launch more than the 16 kernels that docs/results-gpu.md names."""
    try:
        device = compiled.described_gpu()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    strategies = {name: parse_cache(name) for name in ("kivi2", "kivi2r")}
    counts = {}
    for layers in (1, 2):
        config = dataclasses.replace(SHAPES["llama-8b"], num_layers=layers)
        for record in compiled.steps(device, config, strategies, context=1024):
            counts[record["cache"], layers] = record["kernels"]
    assert counts["kivi2r", 2] == counts["kivi2", 2]
    assert counts["kivi2", 2] - counts["kivi2", 1] <= 16
