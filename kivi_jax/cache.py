"""Cache strategies (values that say how tokens are held) and the cache itself. Read `llama.py` next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.buffers import DenseTokens, KiviTokens, Segment, Step
from kivi_jax.config import ModelConfig
from pallas_kernels.pytree import pytree, static
from pallas_kernels.quantization import check_groups

ScaleDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class KiviQuantization:
    """How KIVI packs: see `kivi` for the fields."""

    key_bits: int
    value_bits: int
    key_group_size: int
    value_group_size: int
    residual_length: int
    scale_dtype: ScaleDtype


@dataclass(frozen=True, kw_only=True)
class CacheStrategy:
    """Which segments a layer's cache is made of. Hashable and static under `jax.jit`.

    Build one with `full()` or `kivi()`.
    """

    quantization: KiviQuantization | None = None

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that this strategy does not fit, before anything is computed.

        Raises:
            ValueError: a group does not divide the model's head_dim, or codes do not fill bytes.
        """
        if (kivi := self.quantization) is None:
            return
        head_dim = config.head_dim
        if head_dim % kivi.value_group_size:
            raise ValueError(
                f"value_group_size={kivi.value_group_size} must divide the model's {head_dim=}: "
                f"pass value_group_size={head_dim} or a divisor of it"
            )
        for bits in (kivi.key_bits, kivi.value_bits):
            check_groups(
                kivi.key_group_size, head_dim, bits=bits, group_size=kivi.key_group_size, group_axis="token"
            )

    def hold_prompt(
        self,
        key: Float[Array, "B K P H"],
        value: Float[Array, "B K P H"],
        lengths: Int[Array, "B"],
        *,
        capacity: int,
        window: int | None,
    ) -> tuple[Segment, ...]:
        """The segments of one layer after a right-padded prompt."""
        if (kivi := self.quantization) is None:
            return (DenseTokens.from_prompt(key, value, lengths, capacity=capacity, window=window),)
        return (
            KiviTokens.from_prompt(
                key,
                value,
                lengths,
                capacity=capacity,
                window=window,
                key_bits=kivi.key_bits,
                value_bits=kivi.value_bits,
                key_group_size=kivi.key_group_size,
                value_group_size=kivi.value_group_size,
                residual_length=kivi.residual_length,
                scale_dtype=kivi.scale_dtype,
            ),
        )


def full() -> CacheStrategy:
    """Every token in the model's own precision."""
    return CacheStrategy()


def kivi(
    bits: int = 2,
    group_size: int = 32,
    residual_length: int = 128,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    key_group_size: int | None = None,
    value_group_size: int | None = None,
    scale_dtype: ScaleDtype = "float16",
) -> CacheStrategy:
    """KIVI: packed tokens behind a full-precision residual of the newest ones.

    Args:
        bits: bits per code, 1, 2, 4 or 8; `key_bits` and `value_bits` override it for one side.
        group_size: tokens per group of a key channel and channels per group of a value token;
            `key_group_size` and `value_group_size` override it for one side.
        residual_length: R, the newest tokens kept in full precision; a multiple of the key group.
        scale_dtype: how scales and zeros are stored.

    Raises:
        ValueError: a number is out of range, or the key group does not divide the residual.

    Source: KIVI (arXiv 2402.02750); its default is 2 bits, groups of 32, R = 128.
    """
    quantization = KiviQuantization(
        key_bits=bits if key_bits is None else key_bits,
        value_bits=bits if value_bits is None else value_bits,
        key_group_size=group_size if key_group_size is None else key_group_size,
        value_group_size=group_size if value_group_size is None else value_group_size,
        residual_length=residual_length,
        scale_dtype=scale_dtype,
    )
    for name in ("key_bits", "value_bits"):
        if getattr(quantization, name) not in (1, 2, 4, 8):
            raise ValueError(f"{name}={getattr(quantization, name)} must be 1, 2, 4 or 8")
    for name in ("key_group_size", "value_group_size", "residual_length"):
        if getattr(quantization, name) <= 0:
            raise ValueError(f"{name}={getattr(quantization, name)} must be positive")
    if residual_length % quantization.key_group_size:
        raise ValueError(
            f"{residual_length=} must be a multiple of key_group_size={quantization.key_group_size}: "
            "keys leave the residual in whole groups"
        )
    if scale_dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f'{scale_dtype=} must be "float16", "bfloat16" or "float32"')
    return CacheStrategy(quantization=quantization)


@pytree
class KVCache:
    """All tokens seen so far: per layer a tuple of segments, and how many tokens each row has had.

    `capacity` is the number of tokens a row may reach; it is the caller's to keep.
    """

    layers: tuple[tuple[Segment, ...], ...]
    lengths: Int[Array, "B"]
    strategy: CacheStrategy = static()
    capacity: int = static()


def append(segments: tuple[Segment, ...], step: Step) -> tuple[Segment, ...]:
    """One layer after its last segment has taken a token."""
    return (*segments[:-1], segments[-1].append(step))


def settle(
    layers: Sequence[tuple[Segment, ...]], active: Bool[Array, "B"]
) -> tuple[tuple[Segment, ...], ...]:
    """All layers after what a step made due is done in the segments that grow."""
    growing = [segments[-1] for segments in layers]
    settled = type(growing[0]).settle(growing, active)
    return tuple((*segments[:-1], last) for segments, last in zip(layers, settled, strict=True))


def cache_bytes(cache: KVCache) -> dict[str, int]:
    """Bytes of the cache by part, from the arrays themselves; `total` is their sum.

    `packed`: codes. `scales`: scales and zeros. `rings`: KIVI's residual. `dense`: full-precision
    tokens. `metadata`: lengths.
    """
    parts = {"packed": 0, "scales": 0, "rings": 0, "dense": 0, "metadata": 0}
    of_field = {
        "words": "packed",
        "scale": "scales",
        "zero": "scales",
        "key_ring": "rings",
        "value_ring": "rings",
        "keys": "dense",
        "values": "dense",
        "lengths": "metadata",
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        parts[of_field[path[-1].name]] += leaf.size * leaf.dtype.itemsize
    return {**parts, "total": sum(parts.values())}
