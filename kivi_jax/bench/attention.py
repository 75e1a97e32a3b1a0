"""Decode attention over packed tokens against attention over dense ones, in one process.

All contenders of a case run in turn, round after round, and the median of each is compared: a machine that
is busy for a second slows all of them alike. Bytes are those of the arrays that a call reads.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from pallas_kernels.partials import attend as attend_dense
from pallas_kernels.partials import normalize
from pallas_kernels.pytree import tree_bytes
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_attention.api import Implementation
from pallas_kernels.quantized_attention.cases import BENCHMARK, Case


def softmax_attention(
    query: Float[Array, "B N H"], key: Float[Array, "B K S H"], value: Float[Array, "B K S H"]
) -> Float[Array, "B N H"]:
    """What one writes first: einsum, softmax, einsum over every token."""
    batch, _, dim = query.shape
    grouped = (query * dim**-0.5).reshape(batch, key.shape[1], -1, dim)
    weight = jax.nn.softmax(jnp.einsum("bkgh,bksh->bkgs", grouped, key), -1)
    return jnp.einsum("bkgs,bksh->bkgh", weight, value).reshape(query.shape)


def partial_attention(
    query: Float[Array, "B N H"], key: Float[Array, "B K S H"], value: Float[Array, "B K S H"]
) -> Float[Array, "B N H"]:
    """`partials.attend`, which a full cache uses, over every token."""
    visible = jnp.ones((key.shape[0], 1, key.shape[2]), bool)
    return normalize(attend_dense(query, key, value, visible, scale=query.shape[-1] ** -0.5))


def packed_attention(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    *,
    implementation: Implementation,
) -> Float[Array, "B N H"]:
    """`quantized_attention` by one implementation."""
    part = quantized_attention(query, key, value, start=start, end=end, implementation=implementation)
    return normalize(part)


def contenders(case: Case, implementations: Sequence[Implementation]) -> dict[str, tuple[Any, tuple]]:
    """Name -> (jitted function, its arguments)."""
    query, key, value = case.dense()
    half = tuple(x.astype(jnp.bfloat16) for x in (query, key, value))
    packed = jax.jit(case.pack)(key, value)
    start, end = case.token_ranges()
    chosen: dict[str, tuple[Any, tuple]] = {}
    for name in implementations:
        attend = functools.partial(packed_attention, implementation=name)
        chosen[name] = (jax.jit(attend), (query, *packed, start, end))
    for dtype, arrays in (("float32", (query, key, value)), ("bfloat16", half)):
        chosen[f"{dtype} softmax"] = (jax.jit(softmax_attention), arrays)
        chosen[f"{dtype} partial"] = (jax.jit(partial_attention), arrays)
    return chosen


def interleaved_medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, all of them called in turn `repeats` times after two warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def run(
    cases: Sequence[Case] = BENCHMARK, repeats: int = 15, implementations: Sequence[Implementation] = ("xla",)
) -> list[dict[str, Any]]:
    """One record per case and contender.

    Keys: case, contender, ms, bytes, temp_bytes, gigabytes_per_s, and the speed relative to the fastest
    dense contender of either dtype in the same run: x_float32, x_bfloat16.
    """
    records = []
    for case in cases:
        chosen = contenders(case, implementations)
        calls = {name: functools.partial(f, *arguments) for name, (f, arguments) in chosen.items()}
        seconds = interleaved_medians(calls, repeats)
        best = {
            dtype: min(seconds[name] for name in seconds if name.startswith(dtype))
            for dtype in ("float32", "bfloat16")
        }
        for name, (f, arguments) in chosen.items():
            nbytes = tree_bytes(arguments)
            memory = f.lower(*arguments).compile().memory_analysis()
            records.append(
                {
                    "case": case.name,
                    "contender": name,
                    "ms": seconds[name] * 1e3,
                    "bytes": nbytes,
                    "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
                    "gigabytes_per_s": nbytes / seconds[name] / 1e9,
                    "x_float32": best["float32"] / seconds[name],
                    "x_bfloat16": best["bfloat16"] / seconds[name],
                }
            )
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """The records as a table."""
    device = jax.devices()[0]
    title = f"decode attention, jax {jax.__version__}, {device.device_kind}"
    out = Table("case", "contender", title=title)
    for heading in ("ms", "MB read", "temp MB", "GB/s", "x dense f32", "x dense bf16"):
        out.add_column(heading, justify="right")
    for r in records:
        temporary = "" if r["temp_bytes"] is None else f"{r['temp_bytes'] / 1e6:.1f}"
        out.add_row(
            r["case"],
            r["contender"],
            f"{r['ms']:.3f}",
            f"{r['bytes'] / 1e6:.1f}",
            temporary,
            f"{r['gigabytes_per_s']:.1f}",
            f"{r['x_float32']:.2f}",
            f"{r['x_bfloat16']:.2f}",
        )
    return out


if __name__ == "__main__":
    Console(width=110).print(table(run()))
