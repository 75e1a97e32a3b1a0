"""Quantizing and packing on NVIDIA GPUs (Ampere and later): one read, one write. Pallas' Triton backend.

A program takes all channels of some tokens: of whole groups of keys, or of a page of values. It works on
*blocks* of one plane of channels (see `packing.py`), all of one shape, so that the codes that share a word
lie in the same place of each, and packing them exchanges nothing between threads. The arithmetic is XLA's:
`groups.py`.

Group by group of keys, a block has every sixteenth token of it. As one block its tokens would be spread
over the threads, and each would repeat the whole group's arithmetic: 80 instructions for each number (2 bits
in groups of 32, sm_90) instead of 16. As 32 blocks it would be fewer, and take four times as long to compile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.quantize import groups
from pallas_kernels.quantize.packing import PAGE, pack_planes, split_channels, words_per_token
from pallas_kernels.triton_call import check_powers_of_two, triton_call

_KEY_BLOCKS = 16  # of a group, in each plane
_KEY_NUMBERS = 128  # of a block of keys, at least where there are so many
_MOST_NUMBERS = 2**15  # that a program holds in its registers
_MOST_WARPS = 16

_quantize_groups = functools.partial(groups.quantize_groups, to_code=groups.round_by_triton)


def quantize(
    x: Float[Array, "*B S H"],
    bits: int,
    group_size: int,
    group_axis: str,
    scale_dtype: DTypeLike,
    trim: float = 0.0,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The words, scale and zero of `quantization.quantize`, of shapes that `check_groups` has accepted.

    Raises:
        NotImplementedError: the kernel has no blocks for a group or head size, or cannot read the dtype.
    """
    _check(x, group_size, group_axis)
    run = _quantize_keys if group_axis == "token" else _quantize_values
    return run(x, bits, group_size, jnp.dtype(scale_dtype), trim, interpret)


def _check(x: Array, group_size: int, group_axis: str) -> None:
    """Refuse what the kernel has no blocks for."""
    channels = x.shape[-1]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{x.dtype} is no float of 16 or 32 bits")
    check_powers_of_two(channels, group_size)
    tokens = group_size if group_axis == "token" else PAGE
    if tokens * channels > _MOST_NUMBERS:
        raise NotImplementedError(f"{tokens} tokens of {channels} channels are too many for a program")
    if not x.size:
        raise NotImplementedError("there is nothing to quantize")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize_keys(
    x: Float[Array, "*B S H"], bits: int, group_size: int, scale_dtype: Any, trim: float, interpret: bool
) -> tuple[Array, Array, Array]:
    *lead, tokens, channels = x.shape
    words = words_per_token(channels, bits)
    planes = channels // words
    # Groups follow each other in memory, whatever their rows: a program takes any of them.
    groups, blocks = x.size // (group_size * channels), min(group_size, _KEY_BLOCKS)
    each = group_size // blocks
    taken = math.gcd(groups, max(1, _KEY_NUMBERS // (each * words)))
    packed, scale, zero = _call(
        functools.partial(_pack_keys, bits, trim),
        x.reshape(groups // taken, taken, each, blocks, planes, words),
        [((taken, each, blocks, words), jnp.uint8), *[((taken, planes, words), scale_dtype)] * 2],
        warps=taken * each * words // 64,  # two neighbours of a block are a thread's
        interpret=interpret,
    )
    per_group = (*lead, tokens // group_size, channels)
    return packed.reshape(*lead, tokens, words), scale.reshape(per_group), zero.reshape(per_group)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize_values(
    x: Float[Array, "*B S H"], bits: int, group_size: int, scale_dtype: Any, trim: float, interpret: bool
) -> tuple[Array, Array, Array]:
    *lead, tokens, channels = x.shape
    words, pages = words_per_token(channels, bits), (*lead, tokens // PAGE)
    axes = split_channels(channels, bits, group_size)
    sets, _, shared, _ = axes
    packed, scale, zero = _call(
        functools.partial(_pack_values, bits, trim),
        x.reshape(math.prod(pages), PAGE, *axes),
        [((words, PAGE), jnp.uint8), *[((sets, shared, PAGE), scale_dtype)] * 2],
        warps=channels // 64,  # a thread has 64 numbers
        interpret=interpret,
    )
    per_group = (*pages, channels // group_size, PAGE)
    return packed.reshape(*pages, words, PAGE), scale.reshape(per_group), zero.reshape(per_group)


def _call(
    kernel: Callable[..., None], x: Array, outputs: list[tuple[tuple[int, ...], Any]], **options: Any
) -> Sequence[Array]:
    """Run a program on each x[i], which writes [i] of outputs whose other axes and dtypes are given."""
    programs, warps = x.shape[0], min(max(options.pop("warps"), 1), _MOST_WARPS)

    def of_program(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i: (i, *(0 for _ in shape)))

    return triton_call(
        kernel,
        name="quantize",
        grid=(programs,),
        in_specs=[of_program(x.shape[1:])],
        out_specs=[of_program(shape) for shape, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct((programs, *shape), dtype) for shape, dtype in outputs],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        **options,
    )(x)


def _pack_keys(bits: int, trim: float, x_ref: Any, words_ref: Any, scale_ref: Any, zero_ref: Any) -> None:
    """One program: x [groups, tokens of a block, blocks, planes, words].

    Plane by plane in a loop: Triton's passes take a tenth of the time for one plane that they take for four.
    """
    blocks, planes = x_ref.shape[2:4]

    def add_plane(j: Array, packed: tuple[Array, ...]) -> tuple[Array, ...]:
        group = [x_ref[:, :, i, j] for i in range(blocks)]
        codes, scale_ref[:, j], zero_ref[:, j] = _quantize_groups(group, 1, bits, scale_ref.dtype, trim=trim)
        shift = (bits * j).astype(jnp.uint8)
        return tuple(words | (code << shift) for words, code in zip(packed, codes, strict=True))

    blank = jnp.zeros((*words_ref.shape[:2], words_ref.shape[3]), jnp.uint8)
    for i, words in enumerate(jax.lax.fori_loop(0, planes, add_plane, (blank,) * blocks)):
        words_ref[:, :, i] = words


def _pack_values(bits: int, trim: float, x_ref: Any, words_ref: Any, scale_ref: Any, zero_ref: Any) -> None:
    """One program: x [32, sets of planes, planes a group spans, groups that share a plane, channels]."""
    sets, spanned = x_ref.shape[1:3]
    codes = []
    for i in range(sets):
        group = [x_ref[:, i, j] for j in range(spanned)]
        planes, scale, zero = _quantize_groups(group, 2, bits, scale_ref.dtype, trim=trim)
        scale_ref[i], zero_ref[i] = scale.T, zero.T
        codes += planes
    words_ref[...] = pack_planes(codes, bits).reshape(PAGE, -1).T
