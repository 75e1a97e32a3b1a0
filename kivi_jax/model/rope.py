"""Rotary position embedding with long-context scaling. Read `attention.py` next.

Channel pair (i, i + H/2) of a query or key at position p is rotated by the angle p * frequency[i] (the
half-split pairing of Hugging Face checkpoints); of a partly rotated head H is the rotated part. Scaling a
context changes the frequencies only, and for YaRN and LongRoPE also the length of the rotated vectors.

Source: RoFormer, arXiv 2104.09864; dynamic NTK and YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753;
Llama 3.1 release (`llama3`).
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kivi_jax.config import ModelConfig, RopeConfig

Rotate = Callable[[Float[Array, "B T N+K H"]], Float[Array, "B T N+K H"]]


def rotation(
    config: ModelConfig,
    layer: int,
    lengths: Int[Array, "B"],
    positions: Int[Array, "#B T"],
    *,
    queries: int | None = None,
) -> Rotate:
    """What layer number `layer` does to query and key heads, side by side, at their positions.

    RoPE, and for some families a factor on queries, so that scores, which caches scale by
    1 / sqrt(head_dim), are scaled as the family does. `lengths`: see `rope_frequencies`. The first `queries`
    heads are queries, by default as many as the model has.
    """
    rope, scale = config.rope_of(layer), _query_scale(config, layer, positions)
    queries = config.num_heads if queries is None else queries

    def rotate(heads: Array) -> Array:
        if rope is not None:
            frequencies, scaling = rope_frequencies(config, rope, lengths)
            heads = apply_rope(heads, positions, frequencies, scaling)
        if scale is None:
            return heads
        is_query = (jnp.arange(heads.shape[2]) < queries)[:, None]
        return (heads.astype(jnp.float32) * jnp.where(is_query, scale, 1)).astype(heads.dtype)

    return rotate


def _query_scale(
    config: ModelConfig, layer: int, positions: Int[Array, "#B T"]
) -> Float[Array, "#B T 1 1"] | None:
    """The factor on queries beyond 1 / sqrt(head_dim); None: 1."""
    rope = config.rope_of(layer)
    multiplier, beta = config.attention_multiplier, 0.0 if rope is None else rope.query_beta
    if multiplier is None and not beta:
        return None
    constant = 1.0 if multiplier is None else multiplier * config.head_dim**0.5
    scale = jnp.full((*positions.shape, 1, 1), constant, jnp.float32)
    if rope is not None and beta:
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        scale *= 1 + beta * jnp.log1p((positions // original).astype(jnp.float32))[..., None, None]
    return scale


def rope_frequencies(
    config: ModelConfig, rope: RopeConfig, lengths: Int[Array, "B"]
) -> tuple[Float[Array, "#B pairs"], float]:
    """Radians per token of every channel pair that is rotated, and the factor on rotated vectors.

    `lengths` are the tokens of each row so far; `dynamic` and `longrope` look at them. Their frequencies
    change while a row grows; keys already rotated stay as they are.
    """
    dim = rope.channels_of(config.head_dim)
    if rope.kind == "dynamic":
        return _dynamic(rope, dim, config.max_position_embeddings, lengths), 1.0
    # In float32 and in this order, as transformers has it: models are trained with these roundings.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequency = np.float32(1) / np.float32(rope.theta) ** exponent
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    scaling = 1.0
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _llama3(rope, frequency, original)
    elif rope.kind == "yarn":
        frequency = _yarn(rope, frequency, dim, original)
        scaling = _yarn_scaling(rope)
    elif rope.kind == "longrope":
        short, long = (
            jnp.asarray(frequency / np.asarray(factor), jnp.float32)
            for factor in (rope.short_factor, rope.long_factor)
        )
        return jnp.where(lengths[:, None] > original, long, short), _longrope_scaling(rope, original)
    return jnp.asarray(frequency, jnp.float32)[None], scaling


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"],
    frequencies: Float[Array, "#B pairs"],
    scaling: float,
) -> Float[Array, "B T N H"]:
    """Rotate every head of every token to its position. Computed in float32, returned in x's dtype.

    Channels past the frequencies' pairs are left as they are.
    """
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[:, None, None, :]
    cos, sin = jnp.cos(angle) * scaling, jnp.sin(angle) * scaling
    pairs = frequencies.shape[1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)


def _dynamic(
    rope: RopeConfig, dim: int, max_positions: int, lengths: Int[Array, "B"]
) -> Float[Array, "B pairs"]:
    """NTK-aware scaling: a row longer than the trained context gets a larger theta."""
    length = jnp.maximum(lengths, max_positions).astype(jnp.float32)[:, None]
    stretch = rope.factor * length / max_positions - (rope.factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32)[None] / dim)


def _llama3(rope: RopeConfig, frequency: np.ndarray, original: int) -> np.ndarray:
    """Slow pairs are slowed down by `factor`, fast pairs kept, with a smooth step in between."""
    turns = original * frequency / (2 * math.pi)  # in the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequency * kept + frequency / rope.factor * (1 - kept)


def _yarn(rope: RopeConfig, frequency: np.ndarray, dim: int, original: int) -> np.ndarray:
    """As `_llama3`, but the step is linear in the pair's index."""

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return frequency * (1 - slowed) + frequency / rope.factor * slowed


def _longrope_scaling(rope: RopeConfig, original: int) -> float:
    """As for YaRN."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))


def _yarn_scaling(rope: RopeConfig) -> float:
    """The factor on rotated vectors, which sharpens attention over a stretched context."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
