"""Asymmetric grouped quantization, and the tensors it makes. Read `partials.py` next.

A group of numbers is stored as codes with one scale and one zero, and denotes `code * scale + zero`;
`groups.py` states how they are computed.

On an NVIDIA GPU `quantize` is a kernel, `kernel.py`: one launch that reads once and writes once. XLA
makes four kernels of it, which move two to three times the bytes (`kivi-jax bench compiled`). What a decode
step writes there is `residual_kernel.py`'s; elsewhere `set_token` and `set_block` update the donated stores.

Source: KIVI (arXiv 2402.02750) section 3.1.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from pallas_kernels.device import default_device
from pallas_kernels.dispatch import TRITON, by_kernel_or_xla, load_kernel
from pallas_kernels.pytree import pytree, static
from pallas_kernels.quantize.groups import quantize_groups
from pallas_kernels.quantize.packing import PAGE, from_pages, pack, to_pages, unpack, words_per_token

GroupAxis = Literal["token", "channel"]
Implementation = Literal["xla", "pallas_triton"]

_KERNEL = "pallas_kernels.quantize.kernel"


@pytree
class QuantizedTensor:
    """An array [*B, S, H] (S tokens of H channels) stored as packed codes.

    `group_axis="token"`: a group is `group_size` consecutive tokens of one channel (KIVI's keys).
    `group_axis="channel"`: a group is `group_size` consecutive channels of one token (KIVI's values).
    `packing.py` draws the order of the words. The array denoted is `code * scale + zero`.
    """

    words: UInt8[Array, "*words"]
    scale: Float[Array, "*groups"]
    zero: Float[Array, "*groups"]
    bits: int = static()
    group_size: int = static()
    group_axis: GroupAxis = static()
    trim: float = static(default=0.0)  # of what is written to it: see `groups.py`

    @property
    def shape(self) -> tuple[int, ...]:
        """[*B, S, H] of the array denoted."""
        planes = 8 // self.bits
        if self.group_axis == "token":
            *lead, tokens, words = self.words.shape
            return (*lead, tokens, words * planes)
        *lead, pages, words, page = self.words.shape
        return (*lead, pages * page, words * planes)

    @property
    def nbytes(self) -> int:
        """Bytes held: words, scales and zeros."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def check_groups(tokens: int, channels: int, *, bits: int, group_size: int, group_axis: GroupAxis) -> None:
    """Refuse shapes that do not divide into groups, bytes and pages.

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8; codes do not fill whole bytes; `group_size` does not
            divide the axis it runs along; or a channel-grouped tensor's tokens do not fill pages.
    """
    words_per_token(channels, bits)
    if group_axis not in ("token", "channel"):
        raise ValueError(f'{group_axis=} must be "token" or "channel"')
    if group_size <= 0:
        raise ValueError(f"{group_size=} must be positive")
    if group_axis == "token" and tokens % group_size:
        raise ValueError(f"{group_size=} must divide the number of tokens, {tokens}")
    if group_axis == "channel":
        if channels % group_size:
            raise ValueError(f"{group_size=} must divide the number of channels, {channels}")
        if tokens % PAGE:
            raise ValueError(f"the number of tokens, {tokens}, must be a multiple of {PAGE} (one page)")


def quantize(
    x: Float[Array, "*B S H"],
    *,
    bits: int,
    group_size: int,
    group_axis: GroupAxis,
    scale_dtype: DTypeLike = jnp.float16,
    trim: float = 0.0,
    implementation: Implementation | None = None,
) -> QuantizedTensor:
    """Quantize and pack `x`; `scale` and `zero` are stored as `scale_dtype`.

    `trim`: see `groups.py`. By default by the kernel on NVIDIA GPUs that can, and else by XLA.

    Raises:
        ValueError: see `check_groups`.
        NotImplementedError: the `implementation` asked for cannot do this case, and why.
    """
    *_, tokens, channels = x.shape
    check_groups(tokens, channels, bits=bits, group_size=group_size, group_axis=group_axis)

    def by_kernel(module: Any) -> tuple[Array, Array, Array]:
        return module.quantize(x, bits, group_size, group_axis, scale_dtype, trim)

    def by_xla() -> tuple[Array, Array, Array]:
        return _quantize(x, bits, group_size, group_axis, scale_dtype, trim)

    if implementation == "xla":
        words, scale, zero = by_xla()
    elif implementation == "pallas_triton":
        words, scale, zero = by_kernel(load_kernel(_KERNEL, TRITON, default_device()))
    else:
        words, scale, zero = by_kernel_or_xla("quantize", _KERNEL, by_kernel, by_xla)
    return QuantizedTensor(words, scale, zero, bits, group_size, group_axis, trim)


def dequantize(x: QuantizedTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*B S H"]:
    """The array that `x` denotes: `code * scale + zero`, computed in float32, cast to `dtype`."""
    if x.group_axis == "token":
        codes, per_group = unpack(x.words, x.bits), (x.scale, x.zero)
        scale, zero = (jnp.repeat(part, x.group_size, axis=-2) for part in per_group)
    else:
        codes = unpack(from_pages(x.words), x.bits)
        per_group = (from_pages(x.scale), from_pages(x.zero))
        scale, zero = (jnp.repeat(part, x.group_size, axis=-1) for part in per_group)
    float32 = jnp.float32
    return (codes.astype(float32) * scale.astype(float32) + zero.astype(float32)).astype(dtype)


def zeros(
    shape: tuple[int, ...],
    *,
    bits: int,
    group_size: int,
    group_axis: GroupAxis,
    scale_dtype: DTypeLike = jnp.float16,
) -> QuantizedTensor:
    """A tensor of the given [*B, S, H] that denotes zeros.

    Raises:
        ValueError: see `check_groups`.
    """
    *lead, tokens, channels = shape
    check_groups(tokens, channels, bits=bits, group_size=group_size, group_axis=group_axis)
    words = words_per_token(channels, bits)
    if group_axis == "token":
        word_shape, group_shape = (tokens, words), (tokens // group_size, channels)
    else:
        pages = tokens // PAGE
        word_shape, group_shape = (pages, words, PAGE), (pages, channels // group_size, PAGE)
    scale = jnp.zeros((*lead, *group_shape), scale_dtype)
    return QuantizedTensor(
        jnp.zeros((*lead, *word_shape), jnp.uint8), scale, scale, bits, group_size, group_axis
    )


def pad_tokens(tensor: QuantizedTensor, tokens: int) -> QuantizedTensor:
    """Extend a [*B, S, H] tensor with zeros to `tokens` tokens: whole groups and pages, at least S."""
    held, lead = tensor.shape[-2], len(tensor.shape) - 2

    def pad(part: Array) -> Array:
        extra = part.shape[lead] * tokens // held - part.shape[lead]
        return jnp.pad(part, [(0, extra if axis == lead else 0) for axis in range(part.ndim)])

    return jax.tree.map(pad, tensor)


def set_token(
    tensor: QuantizedTensor, slot: Int[Array, "B"], token: Float[Array, "B K H"]
) -> QuantizedTensor:
    """Quantize one token per row and write it at `slot` of a channel-grouped [B, K, S, H] tensor.

    A slot outside [0, S) writes nothing.
    """
    parts = _quantize_tokens(token, tensor.bits, tensor.group_size, tensor.scale.dtype, tensor.trim)
    row, page, lane = jnp.arange(slot.shape[0]), slot // PAGE, slot % PAGE
    stores = (tensor.words, tensor.scale, tensor.zero)
    words, scale, zero = (
        store.at[row, :, page, :, lane].set(part, mode="drop")
        for store, part in zip(stores, parts, strict=True)
    )
    return dataclasses.replace(tensor, words=words, scale=scale, zero=zero)


def set_block(
    tensor: QuantizedTensor,
    slot: Int[Array, "B"],
    block: QuantizedTensor,
    write: Shaped[Array, "B"],
) -> QuantizedTensor:
    """Write a block [B, K, R, H] of whole groups into a token-grouped [B, K, S, H] tensor.

    Row b's block starts at `slot[b]`, a multiple of R; rows where `write` is false keep what they hold.
    """

    def set_rows(store: Array, rows: Array, start: Array, keep: Array) -> Array:
        at = (jnp.zeros_like(start), start, jnp.zeros_like(start))
        old = jax.lax.dynamic_slice(store, at, rows.shape)
        return jax.lax.dynamic_update_slice(store, jnp.where(keep, old, rows), at)

    set_batch = jax.vmap(set_rows)
    group_slot = slot // tensor.group_size
    return dataclasses.replace(
        tensor,
        words=set_batch(tensor.words, block.words, slot, ~write),
        scale=set_batch(tensor.scale, block.scale, group_slot, ~write),
        zero=set_batch(tensor.zero, block.zero, group_slot, ~write),
    )


def get_block(tensor: QuantizedTensor, slot: Int[Array, "B"], tokens: int) -> QuantizedTensor:
    """The block [B, K, tokens, H], of whole groups, at `slot[b]` of a token-grouped [B, K, S, H] tensor."""

    def get_rows(store: Array, start: Array) -> Array:
        size = tokens * store.shape[1] // tensor.shape[2]
        return jax.lax.dynamic_slice_in_dim(store, start, size, axis=1)

    get_batch, group_slot = jax.vmap(get_rows), slot // tensor.group_size
    return dataclasses.replace(
        tensor,
        words=get_batch(tensor.words, slot),
        scale=get_batch(tensor.scale, group_slot),
        zero=get_batch(tensor.zero, group_slot),
    )


def _quantize(
    x: Float[Array, "*B S H"],
    bits: int,
    group_size: int,
    group_axis: GroupAxis,
    scale_dtype: DTypeLike,
    trim: float,
) -> tuple[Array, Array, Array]:
    """Words, scale and zero, by XLA."""
    if group_axis == "channel":
        tokens = _quantize_tokens(x, bits, group_size, scale_dtype, trim)
        words, scale, zero = (to_pages(part) for part in tokens)
        return words, scale, zero
    *lead, tokens, channels = x.shape
    groups = x.reshape(*lead, tokens // group_size, group_size, channels)
    (codes,), scale, zero = quantize_groups([groups], -2, bits, scale_dtype, trim=trim)
    return pack(codes.reshape(x.shape), bits), scale, zero


def _quantize_tokens(
    x: Float[Array, "*B H"], bits: int, group_size: int, scale_dtype: DTypeLike, trim: float
) -> tuple[Array, Array, Array]:
    """Words [*B, W], scale and zero [*B, H / group_size] of tokens grouped over channels."""
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    (codes,), scale, zero = quantize_groups([groups], -1, bits, scale_dtype, trim=trim)
    return pack(codes.reshape(x.shape), bits), scale, zero
