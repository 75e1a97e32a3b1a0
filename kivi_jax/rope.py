"""Rotary position embedding: which frequencies, and how they turn a head. Read `llama.py` next.

Channel pair i of a head is (x[i], x[i + H/2]); position t turns it by the angle `t * inv_freq[i]`.
The long-context scalings change only `inv_freq`; `yarn` also multiplies the result by a constant.

Source: RoFormer (arXiv 2104.09864); for the scalings, transformers' `modeling_rope_utils.py`, whose
float32 arithmetic is followed step by step: at position 100k the last bit of a frequency is an
angle of 0.01.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from kivi_jax.config import ModelConfig, RopeConfig


def rope_frequencies(
    config: ModelConfig, length: Int[Array, "B"] | None = None
) -> tuple[Float32[Array, "#B {config.head_dim//2}"], float]:
    """Radians per token of every channel pair, and what to multiply the rotated head by.

    Only kind `dynamic` looks at `length`, the tokens in each row so far: its frequencies are a
    row's own, `[B, H/2]`, so that it gives the same alone and in any batch. Without `length`,
    and for all other kinds, they are `[1, H/2]`.

    Source: YaRN (arXiv 2309.00071) sections 3.1-3.4; the Llama 3.1 release for `llama3`.
    """
    rope = config.rope
    original = float(rope.original_max_position_embeddings or config.max_position_embeddings)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32)[None, :] / config.head_dim
    inv_freq = 1.0 / rope.theta**exponents
    scaling = 1.0
    match rope.kind:
        case "linear":
            inv_freq = inv_freq / rope.factor
        case "dynamic" if length is not None:
            inv_freq = 1.0 / _dynamic_theta(config, length) ** exponents
        case "llama3":
            inv_freq = _llama3(rope, inv_freq, original)
        case "yarn":
            inv_freq = _yarn(rope, inv_freq, original)
            scaling = _yarn_attention_factor(rope)
    return jnp.asarray(inv_freq, jnp.float32), scaling


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "#B H//2"],
    scaling: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Turn every head by its token's position, in float32; the result has the dtype of `x`."""
    angles = positions.astype(jnp.float32)[:, :, None] * inv_freq[:, None, :]
    cos = (jnp.cos(angles) * scaling)[:, :, None, :]
    sin = (jnp.sin(angles) * scaling)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _dynamic_theta(config: ModelConfig, length: Int[Array, "B"]) -> Float32[Array, "B 1"]:
    """NTK-aware theta, which grows with the tokens beyond the trained context."""
    rope, trained = config.rope, config.max_position_embeddings
    tokens = jnp.maximum(length, trained).astype(jnp.float32)[:, None]
    stretch = rope.factor * tokens / trained - (rope.factor - 1.0)
    return rope.theta * stretch ** (config.head_dim / (config.head_dim - 2))


def _llama3(rope: RopeConfig, inv_freq: np.ndarray, original: float) -> np.ndarray:
    """Slow pairs divided by `factor`, fast ones unchanged, a linear blend between the two bands."""
    wavelength = 2 * math.pi / inv_freq
    turns = original / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1.0 - blend) * inv_freq / rope.factor + blend * inv_freq
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    return np.where(slow, inv_freq / rope.factor, np.where(fast, inv_freq, blended))


def _yarn(rope: RopeConfig, inv_freq: np.ndarray, original: float) -> np.ndarray:
    """Pairs that turn over `beta_fast` times in the trained context unchanged, slow ones scaled."""
    head_dim = 2 * inv_freq.size

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # transformers' guard against an empty range
    pairs = np.arange(head_dim // 2, dtype=np.float32)[None, :]
    ramp = np.clip((pairs - low) / width, 0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1.0 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """How much sharper attention gets with the context, unless the config says it outright."""

    def sharpness(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return sharpness(rope.mscale) / sharpness(rope.mscale_all_dim)
    return sharpness(1.0)
