"""Decode attention on NVIDIA GPUs (Ampere and later) through jax-triton: the way to use Triton from JAX.

The same plan, operands and algorithm as `pallas_triton.py`; the kernels are in `triton_kernels.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.device import compute_capability, default_device
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.quantized_attention.split_kv import MERGED_CHANNELS, Case, operands, plan
from pallas_kernels.quantized_attention.tuning import Tuning
from pallas_kernels.residual.ring import Ring, Token, merge_residual


def attend(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    scale: float,
    held_back: int = 0,
    residual: Ring | None = None,
    own: Token | None = None,
    tuning: Tuning | None = None,
) -> AttentionPartial:
    """See `quantized_attention`. Products are of float16 numbers, sums are float32.

    Raises:
        NotImplementedError: a group or head size that the kernels have no block for; or jax-triton is
            not installed, or does not fit the installed jax and Triton.
    """
    if jax.__version_info__ >= (0, 12):
        raise NotImplementedError(f"jax-triton does not work with jax {jax.__version__}, only below 0.12")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]

        from pallas_kernels.quantized_attention import triton_kernels
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {error}") from error

    case = plan(query, key, value, scale, tuning, interpret=False)
    check(case)
    arrays = operands(case, query, key, value, start, jnp.maximum(end - held_back, 0))
    # Said, because jax-triton would ask the driver, which a machine that only compiles does not have.
    architecture = round(10 * compute_capability(default_device()))
    programs, splits = arrays[2].shape[0], case.tuning.splits
    partials = jax_triton.triton_call(
        *arrays,
        kernel=triton_kernels.attend_split,
        out_shape=shapes(programs, splits, case.heads, dim=case.dim, dtype=jnp.float16),
        grid=(programs, splits),
        num_warps=case.tuning.warps,
        num_stages=case.tuning.stages,
        compute_capability=architecture,
        **constants(case, arrays),
    )
    out, top, denom = jax_triton.triton_call(
        *partials,
        kernel=triton_kernels.merge_splits,
        out_shape=shapes(programs, case.heads, dim=case.dim),
        grid=merge_grid(case, programs),
        num_warps=4,
        compute_capability=architecture,
        **merge_constants(case),
    )
    heads = query.shape[:2]
    packed = AttentionPartial(out.reshape(query.shape), top.reshape(heads), denom.reshape(heads))
    return merge_residual(packed, query, residual, own, start=start, scale=scale)


def check(case: Case) -> None:
    """Refuse, beyond what `plan` refuses, sizes for which these kernels would need padded blocks."""
    for store in (case.key, case.value):
        if store.words != store.columns:
            raise NotImplementedError(f"a token of {store.words} bytes, no power of two")
    if any(n & (n - 1) for n in (case.value.group, case.value_groups)):
        raise NotImplementedError(f"values in groups of {case.value.group}, no power of two")


def shapes(*lead: int, dim: int, dtype: DTypeLike = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of out, which is of `dtype`, max and denom of queries `lead`."""
    number = jax.ShapeDtypeStruct(lead, jnp.float32)
    return jax.ShapeDtypeStruct((*lead, dim), dtype), number, number


def pointers() -> dict[str, str]:
    """Triton's types of the array arguments of `attend_split`, for 16-bit scales."""
    half, word, number, index = "*fp16", "*u8", "*fp32", "*i32"
    types = (index, index, half, word, half, half, word, half, half, half, number, number)
    names = ("START", "END", "Q", "KW", "KS", "KZ", "VW", "VS", "VZ", "OUT", "TOP", "DENOM")
    return dict(zip(names, types, strict=True))


def constants(case: Case, arrays: Sequence[Any]) -> dict[str, Any]:
    """Compile-time arguments of `attend_split` for these `operands`, or their shapes."""
    rows, programs, stores = (arrays[i].shape[0] for i in (0, 2, 3))  # of ranges, queries and keys
    return {
        "UP": case.scale * math.log2(math.e) * 2.0**24,
        "PER_ROW": programs // rows,
        "PER_STORE": programs // stores,
        "SPLITS": case.tuning.splits,
        "HEADS": case.heads,
        "LANES": case.lanes,
        "DIM": case.dim,
        "PAGES": case.tuning.pages,
        "TILES": case.tiles,
        "KEY_BITS": case.key.bits,
        "KEY_COLUMNS": case.key.columns,
        "KEY_GROUP": case.key.group,
        "FOLD": case.fold,
        "VALUE_BITS": case.value.bits,
        "VALUE_COLUMNS": case.value.columns,
        "VALUE_GROUP": case.value.group,
        "VALUE_ROWS": case.value_rows,
        "INTERPRET": case.interpret,
    }


def merge_grid(case: Case, programs: int) -> tuple[int, int, int]:
    """Programs of `merge_splits` after `programs` of `attend_split`."""
    return programs, case.heads, -(-case.dim // MERGED_CHANNELS)


def merge_constants(case: Case) -> dict[str, Any]:
    """Compile-time arguments of `merge_splits`."""
    return {
        "SPLITS": case.tuning.splits,
        "EVERY": pl.next_power_of_2(case.tuning.splits),
        "CHANNELS": MERGED_CHANNELS,
        "HEADS": case.heads,
        "DIM": case.dim,
        "INTERPRET": case.interpret,
    }
