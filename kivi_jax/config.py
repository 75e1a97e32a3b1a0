"""What a model *is*, as frozen values: families differ in fields, never in classes. Read `model/` next.

Every field changes the compiled program, so the whole config is static under `jax.jit`. Translating a
Hugging Face `config.json` into these values is the converter's job (`convert/rules.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kivi_jax.checks import instance, real, whole

MOST_LAYERS = 1000
QueryKeyNorm = Literal["head", "projection"]
NormPlacement = Literal["pre", "post", "both"]
Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and its long-context scaling.

    Fields that a `kind` does not use keep their defaults. Units: `*_position_embeddings` are tokens.

    Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071) for `dynamic` and `yarn`;
    the Llama 3.1 release for `llama3`; LongRoPE (arXiv 2402.13753) for `longrope`.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    partial: float = 1.0  # of a head's channels, the first that are rotated
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # 0: the model's max_position_embeddings
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: derived from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: by pair, for rows of up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: for longer ones
    query_beta: float = 0.0  # queries grow by beta * log(1 + position // original length)

    def __post_init__(self) -> None:
        """Refuse numbers that make positions infinite or not a number.

        Raises:
            ValueError: a factor is not positive and finite, or llama3's two frequencies do not follow each
                other.
        """
        positive = (
            "theta",
            "partial",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        )
        numbers = {name: getattr(self, name) for name in (*positive, "attention_factor")}
        given = {name: real(name, n) for name, n in numbers.items() if n is not None}
        if bad := {name: n for name, n in given.items() if not 0 < n < math.inf}:
            raise ValueError(f"rope's numbers must be positive and finite, got {bad}")
        mscales = {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        if bad := {name: n for name, n in mscales.items() if n is not None and not math.isfinite(n)}:
            raise ValueError(f"rope's scales must be finite, got {bad}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"{self.high_freq_factor=} must be above {self.low_freq_factor=}")
        if self.original_max_position_embeddings < 0:
            raise ValueError(f"{self.original_max_position_embeddings=} must not be negative")

    def channels_of(self, head_dim: int) -> int:
        """How many of a head's channels are rotated."""
        return int(head_dim * self.partial)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a Llama-like decoder: RMSNorm, RoPE, grouped-query attention, gated MLP.

    `num_heads` query heads share `num_kv_heads` KV heads (equal: MHA; 1: MQA). `sliding_window` is in
    tokens, the current one included; `None` attends to everything. `windowed` and `rotated` say of every
    layer whether it has the window and whether it has RoPE; shorter ones are repeated over the layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention_bias: bool = False  # on q, k and v, and on o if output_bias is None
    output_bias: bool | None = None  # on o
    mlp_bias: bool = False  # on gate, up and down
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    eos_ids: tuple[int, ...] = ()
    windowed: tuple[bool, ...] = (True,)
    rotated: tuple[bool, ...] = (True,)
    window_rope: RopeConfig | None = None  # of layers with the window; None: as the others
    qk_norm: QueryKeyNorm | None = None  # RMSNorm of queries and keys before RoPE
    norm_placement: NormPlacement = "pre"  # before attention and MLP, on their output, or both
    norm_offset: float = 0.0  # added to norms' weights
    activation: Activation = "silu"  # of the MLP's gate
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0  # of what a block adds to the residual stream
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None  # c: logits become c * tanh(logits / c)

    def __post_init__(self) -> None:
        """Refuse impossible shapes.

        Raises:
            ValueError: a size is not positive, there are too many layers, or `num_kv_heads` does not divide
                `num_heads`, or `head_dim` or RoPE's part of it is odd (RoPE rotates pairs of channels), or
                `rms_norm_eps` is negative or no number.
        """
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_position_embeddings",
            )
        }
        sizes = {name: whole(name, size) for name, size in sizes.items()}
        if bad := {name: size for name, size in sizes.items() if size <= 0}:
            raise ValueError(f"model sizes must be positive, got {bad}")
        if self.num_layers > MOST_LAYERS:  # each is compiled by itself
            raise ValueError(f"{self.num_layers=} must be at most {MOST_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads=} must divide {self.num_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: RoPE rotates pairs of channels")
        instance("rope", self.rope, RopeConfig, "pass a RopeConfig")
        instance("eos_ids", self.eos_ids, tuple, "pass a tuple of token ids")
        for token in self.eos_ids:
            whole("eos_ids", token)
        for rope in filter(None, (self.rope, self.window_rope)):
            least = 4 if rope.kind == "dynamic" else 2  # with two channels, its theta has no exponent
            if (rotated := rope.channels_of(self.head_dim)) % 2 or not least <= rotated <= self.head_dim:
                raise ValueError(
                    f"{rope.partial=} rotates {rotated} of {self.head_dim} channels: {rope.kind} RoPE needs "
                    f"an even number of them, at least {least}"
                )
        if not 0 <= real("rms_norm_eps", self.rms_norm_eps) < math.inf:
            raise ValueError(f"{self.rms_norm_eps=} must be a finite number, not negative")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(f"{self.sliding_window=} must be positive, or None for no window")
        if not self.windowed or not self.rotated:
            raise ValueError(f"{self.windowed=} and {self.rotated=} must say something of at least one layer")

    @property
    def context(self) -> int:
        """The tokens of the longest row that the model was made for."""
        most, rope = self.max_position_embeddings, self.rope
        stretched = {"dynamic": most, "yarn": rope.original_max_position_embeddings}.get(rope.kind, 0)
        return max(most, int(rope.factor * stretched))

    def window_of(self, layer: int) -> int | None:
        """The window of layer number `layer`."""
        return self.sliding_window if self.windowed[layer % len(self.windowed)] else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """How layer number `layer` rotates; None: it does not."""
        if not self.rotated[layer % len(self.rotated)]:
            return None
        return self.rope if self.window_of(layer) is None else self.window_rope or self.rope

    def first_like(self, layer: int) -> int:
        """The first layer that does the same as number `layer`, with parameters of its own."""
        kind = self.window_of(layer), self.rope_of(layer)
        return next(i for i in range(layer + 1) if (self.window_of(i), self.rope_of(i)) == kind)

    def first_windowed_like(self, layer: int) -> int:
        """The first layer with the window that number `layer` has, or with none."""
        return next(i for i in range(layer + 1) if self.window_of(i) == self.window_of(layer))


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The config whose `dataclasses.asdict`, also after a journey through JSON, is `fields`.

    Raises:
        KeyError, TypeError: fields are missing, unknown, or of another type.
        ValueError: see `ModelConfig`.
    """
    ropes = {name: _rope(rope) for name, rope in fields.items() if name in ("rope", "window_rope")}
    return ModelConfig(**{**_with_tuples(fields), **ropes})


def _rope(fields: Mapping[str, Any] | None) -> RopeConfig | None:
    return None if fields is None else RopeConfig(**_with_tuples(fields))


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
