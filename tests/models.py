"""Small models for tests: random ones of any shape, and the recorded trained one."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.hf import abstract_parameters, build, load_hf
from kivi_jax import Llama, ModelConfig


def config(**changes) -> ModelConfig:
    """A tiny grouped-query Llama; `changes` override its fields."""
    fields = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    return ModelConfig(**(fields | changes))


@cache
def random_llama(model_config: ModelConfig, seed: int = 0) -> Llama:
    """A float32 model of the given shape, its weights drawn by NumPy, for which nothing is compiled."""
    draw = np.random.default_rng(seed)

    def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
        match name:
            case "kernel":  # [in, out]
                return draw.normal(0, shape[0] ** -0.5, shape)
            case "embedding":
                return draw.normal(0, shape[1] ** -0.5, shape)
            case "scale":
                return np.full(shape, 1 - model_config.norm_offset)
            case "bias":
                return np.zeros(shape)
            case _:
                raise AssertionError(name)

    parameters = {
        path: jnp.asarray(weights(path[-1], leaf.shape).astype(np.float32))
        for path, leaf in abstract_parameters(model_config, jnp.float32).items()
    }
    return build(model_config, parameters, jnp.float32)


@cache
def stories(shared: Path) -> Llama:
    """The trained stories260K in float32."""
    return load_hf(shared / "models" / "stories260K", dtype=jnp.float32)


class AsciiTokenizer:
    """One token per byte; ids are shown as printable ASCII."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The bytes of `text` as ids; there are no special tokens."""
        del add_special_tokens
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """One printable character per id."""
        del skip_special_tokens
        return "".join(chr(32 + token % 95) for token in token_ids)
