"""What a Llama or Mistral *is*, as frozen values. Read `model/` next.

Every field changes the compiled program, so the whole config is static under `jax.jit`. Translating a
Hugging Face `config.json` into these values is the converter's job (`convert/rules.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and its long-context scaling.

    Fields that a `kind` does not use keep their defaults. Units: `*_position_embeddings` are tokens.

    Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071) for `dynamic` and `yarn`;
    the Llama 3.1 release for `llama3`.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # 0: the model's max_position_embeddings
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        """Refuse numbers that make positions infinite or not a number.

        Raises:
            ValueError: a factor is not positive and finite, or llama3's two frequencies do not follow each
                other.
        """
        positive = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        numbers = {name: getattr(self, name) for name in (*positive, "attention_factor")}
        if bad := {name: n for name, n in numbers.items() if n is not None and not 0 < n < math.inf}:
            raise ValueError(f"rope's numbers must be positive and finite, got {bad}")
        mscales = {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        if bad := {name: n for name, n in mscales.items() if n is not None and not math.isfinite(n)}:
            raise ValueError(f"rope's scales must be finite, got {bad}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"{self.high_freq_factor=} must be above {self.low_freq_factor=}")
        if self.original_max_position_embeddings < 0:
            raise ValueError(f"{self.original_max_position_embeddings=} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a Llama-like decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU MLP.

    `num_heads` query heads share `num_kv_heads` KV heads (equal: MHA; 1: MQA). `sliding_window` is in
    tokens, the current one included; `None` attends to everything.
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
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse impossible shapes.

        Raises:
            ValueError: a size is not positive, or `num_kv_heads` does not divide `num_heads`, or
                `head_dim` is odd (RoPE rotates pairs of channels), or `rms_norm_eps` is negative
                or no number.
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
        if bad := {name: size for name, size in sizes.items() if size <= 0}:
            raise ValueError(f"model sizes must be positive, got {bad}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads=} must divide {self.num_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: RoPE rotates pairs of channels")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"{self.rms_norm_eps=} must be a finite number, not negative")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(f"{self.sliding_window=} must be positive, or None for no window")


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The config whose `dataclasses.asdict`, also after a journey through JSON, is `fields`.

    Raises:
        KeyError, TypeError: fields are missing, unknown, or of another type.
        ValueError: see `ModelConfig`.
    """
    rope, eos_ids = RopeConfig(**fields["rope"]), tuple(fields["eos_ids"])
    return ModelConfig(**{**fields, "rope": rope, "eos_ids": eos_ids})
