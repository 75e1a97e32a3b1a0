"""Models of others that ours are timed beside."""

from typing import Any

from kivi_jax.config import ModelConfig


def llama_config(config: ModelConfig, **others: Any) -> Any:
    """transformers' config of a Llama of the same shape; `others` are fields of its own."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        **others,
    )
