"""A small model made on the spot, for a first try without a checkpoint: random weights, random text."""

from collections.abc import Sequence

from flax import nnx

from kivi_jax.config import ModelConfig
from kivi_jax.llama import Llama

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
)


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


def random_model() -> tuple[Llama, AsciiTokenizer]:
    """The model and its tokenizer."""
    return Llama(CONFIG, rngs=nnx.Rngs(0)), AsciiTokenizer()
