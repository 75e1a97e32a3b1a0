"""Model shapes to plan for and to measure: random weights, real sizes."""

from kivi_jax.config import ModelConfig, RopeConfig

SHAPES: dict[str, ModelConfig] = {
    "125m": ModelConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=131072,
    ),
    "llama-1b": ModelConfig(  # Llama-3.2-1B
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=32.0, original_max_position_embeddings=8192),
        tie_word_embeddings=True,
    ),
    "mistral-7b": ModelConfig(  # Mistral-7B-v0.3
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rope=RopeConfig(theta=1000000.0),
    ),
    "llama-8b": ModelConfig(  # Llama-3.1-8B
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192),
    ),
}
