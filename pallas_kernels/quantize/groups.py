"""The arithmetic of quantizing a group of numbers: the one statement of it, for XLA and for a kernel's body.

    zero = low        scale = (high - zero) / (2**bits - 1)
    code = round_half_even(clip((x - zero) / scale, 0, 2**bits - 1))        x' = code * scale + zero

`low` and `high` are the group's minimum and maximum. Everything is float32. Where zero and scale are kept
in 16 bits, the zero is rounded down and the scale up, so that the codes still span the group and
|x - x'| <= scale / 2 holds with what is stored. A constant group has scale 0 and x' = zero: no 0/0.

Where a group is *trimmed*, `low` and `high` are a share of the range further in: of 32 numbers from a normal
distribution, two bits make steps of 1.4 standard deviations, and 1.0 would have the least squared error. That
would be too much: such codes shrink all numbers towards their mean, which no average over tokens removes.

Written with what both compilers keep as it stands: Pallas' Triton backend has no `nextafter`, and XLA for a
GPU takes a cast to 16 bits and back to be the identity, so it must not decide anything. Only codes are
rounded in two ways, because XLA can do what Triton cannot, and makes nonsense of what Triton can.

Source: KIVI (arXiv 2402.02750) section 3.1; the rounding rule is ours.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

ToCode = Callable[[Float32[Array, "..."]], UInt8[Array, "..."]]

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # normal number: hardware may take smaller ones for 0
_EXPONENT = 0x7F800000  # of a float32
_INVERT = 0x7F000000  # less the bits of a power of two: the bits of its inverse


def round_by_xla(steps: Float32[Array, "..."]) -> UInt8[Array, "..."]:
    """The nearest integer (ties: the even one) of numbers in [0, 255]."""
    return jnp.round(steps).astype(jnp.uint8)


def round_by_triton(steps: Float32[Array, "..."]) -> UInt8[Array, "..."]:
    """The same with a sum whose lowest byte it is: Triton has no `round`.

    XLA must not see it on a GPU, where it took the whole sum and made 255 of every code (jax 0.11.2, H100).
    """
    return _as_int(steps + 1.5 * 2**23).astype(jnp.uint8)


def quantize_groups(
    blocks: Sequence[Float[Array, "..."]],
    axis: int,
    bits: int,
    scale_dtype: DTypeLike,
    *,
    trim: float = 0.0,
    to_code: ToCode = round_by_xla,
) -> tuple[list[UInt8[Array, "..."]], Float[Array, "..."], Float[Array, "..."]]:
    """Codes of every block, and the groups' scale and zero, to store.

    A group runs along `axis` and through all of the blocks: they are parts of one array. `trim` is the share
    of its range that is left out at each end: 0, or a power of two, which multiplies without error.
    """
    blocks = [block.astype(jnp.float32) for block in blocks]
    low = functools.reduce(jnp.minimum, blocks).min(axis, keepdims=True)
    high = functools.reduce(jnp.maximum, blocks).max(axis, keepdims=True)
    if trim:
        margin = high * trim - low * trim
        low, high = low + margin, high - margin
    scale, zero = scale_and_zero(low, high, bits, scale_dtype)
    codes = [nearest_codes(block, scale, zero, bits, to_code) for block in blocks]
    return codes, scale.squeeze(axis).astype(scale_dtype), zero.squeeze(axis).astype(scale_dtype)


def scale_and_zero(
    low: Float32[Array, "..."], high: Float32[Array, "..."], bits: int, dtype: DTypeLike
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """Scale and zero of groups: float32 numbers that `dtype` holds exactly."""
    zero = _representable(low, jnp.floor, dtype)
    return _representable((high - zero) / (2**bits - 1), jnp.ceil, dtype), zero


def nearest_codes(
    x: Float32[Array, "..."],
    scale: Float32[Array, "..."],
    zero: Float32[Array, "..."],
    bits: int,
    to_code: ToCode,
) -> UInt8[Array, "..."]:
    """Codes in [0, 2**bits) of numbers whose groups have this scale and zero.

    Said as a product, because XLA makes one of the division wherever it sees that a group shares its scale,
    and only there: codes in the middle between two would depend on how a program was compiled.
    """
    inverse = 1 / jnp.where(scale >= _SMALLEST, scale, 1)
    return to_code(jnp.clip((x - zero) * inverse, 0, 2**bits - 1))


def _representable(
    x: Float32[Array, "..."], toward: Callable[[Float[Array, "..."]], Float[Array, "..."]], dtype: DTypeLike
) -> Float32[Array, "..."]:
    """Round to a number that `dtype` holds, by `jnp.floor` or `jnp.ceil`; saturates at its largest ones.

    That is a multiple of the spacing of its numbers near `x`, a power of two, which divides without error.
    """
    info = jnp.finfo(dtype)
    x = jnp.clip(x, float(info.min), float(info.max))
    if info.nmant >= jnp.finfo(jnp.float32).nmant:
        return x
    power = _as_float(_as_int(x) & _EXPONENT)  # of two, the largest that is not above |x|
    spacing = jnp.maximum(power * float(info.eps), max(float(info.smallest_subnormal), _SMALLEST))
    return toward(x * _as_float(_INVERT - _as_int(spacing))) * spacing


def _as_int(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _as_float(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)
