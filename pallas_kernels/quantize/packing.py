"""The bit layout of packed codes: the one statement of it. Read `quantization.py` next.

A token's `H` codes of `bits` bits become `W = H * bits / 8` bytes. A byte ("word") holds `P = 8 / bits`
codes, one from each *plane* of `W` neighbouring channels, and no byte spans two tokens:

    bit field j of word w  =  channel j * W + w          0 <= j < P,  0 <= w < W

    2 bits, H = 8:   W = 2, P = 4          word 0                 word 1
                     bits 7..0     c6  c4  c2  c0         c7  c5  c3  c1

so unpacking one plane is a shift and a mask on whole arrays, and yields contiguous channels.

Keys and values use the same bytes in two orders. A *page* is `PAGE` = 32 consecutive tokens:

    keys    words [S, W]            scale, zero [S / group, H]           a group: tokens of one channel
    values  words [S / 32, W, 32]   scale, zero [S / 32, H / group, 32]  a group: channels of one token

Keys keep channels minor and values keep tokens minor, because that is the operand order in which a GPU's
matrix unit consumes `query . key` and `probability . value` without a transpose.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt8

Bits = Literal[1, 2, 4, 8]
PAGE = 32


def words_per_token(channels: int, bits: int) -> int:
    """Bytes that `channels` codes of `bits` bits take.

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8, or the codes do not fill whole bytes.
    """
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"{bits=} must be 1, 2, 4 or 8")
    planes = 8 // bits
    if channels % planes:
        raise ValueError(f"{channels=} must be a multiple of {planes}, the codes a byte holds at {bits=}")
    return channels // planes


def pack(codes: UInt8[Array, "*B H"], bits: int) -> UInt8[Array, "*B W"]:
    """Pack codes in [0, 2**bits) into words, plane by plane (see the module's drawing).

    Raises:
        ValueError: see `words_per_token`.
    """
    words = words_per_token(codes.shape[-1], bits)
    planes = codes.reshape(*codes.shape[:-1], 8 // bits, words)
    return pack_planes([planes[..., j, :] for j in range(8 // bits)], bits)


def pack_planes(planes: Sequence[UInt8[Array, "*W"]], bits: int) -> UInt8[Array, "*W"]:
    """The words whose bit field `j` holds the codes of plane `j`."""
    shifted = [codes << jnp.uint8(bits * j) for j, codes in enumerate(planes)]
    return functools.reduce(jnp.bitwise_or, shifted)


def plane(words: UInt8[Array, "*W"], j: int, bits: int) -> UInt8[Array, "*W"]:
    """The codes in bit field `j` of every word."""
    return (words >> jnp.uint8(bits * j)) & jnp.uint8(2**bits - 1)


def split_channels(channels: int, bits: int, group_size: int) -> tuple[int, int, int, int]:
    """Axes that a token's channels split into, so that a group of values is all of some of them.

    (sets of planes, planes of a set, groups that share a plane, channels): a group spans the planes of a set,
    or else several groups share a plane. For powers of two.
    """
    words = words_per_token(channels, bits)
    spanned, shared = max(1, group_size // words), max(1, words // group_size)
    return channels // words // spanned, spanned, shared, words // shared


def unpack(words: UInt8[Array, "*B W"], bits: int) -> UInt8[Array, "*B H"]:
    """The inverse of `pack`."""
    return jnp.concatenate([plane(words, j, bits) for j in range(8 // bits)], axis=-1)


def to_pages(x: Shaped[Array, "*B S C"]) -> Shaped[Array, "*B pages C 32"]:
    """Reorder token-major rows into pages with tokens minor; `S` is a multiple of 32."""
    return x.reshape(*x.shape[:-2], -1, PAGE, x.shape[-1]).swapaxes(-1, -2)


def from_pages(x: Shaped[Array, "*B pages C 32"]) -> Shaped[Array, "*B S C"]:
    """The inverse of `to_pages`."""
    *lead, pages, channels, _ = x.shape
    return x.swapaxes(-1, -2).reshape(*lead, pages * PAGE, channels)
