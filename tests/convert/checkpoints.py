"""Tiny Hugging Face checkpoints written without torch, whole or broken on purpose."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = dict(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    eos_token_id=2,
)
GATE = "model.layers.0.mlp.gate_proj.weight"


def tensors() -> dict[str, np.ndarray]:
    """Random weights that fit `CONFIG`."""
    shapes = {
        "model.embed_tokens.weight": (32, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.k_proj.weight": (8, 16),
        "model.layers.0.self_attn.v_proj.weight": (8, 16),
        "model.layers.0.self_attn.o_proj.weight": (16, 16),
        GATE: (24, 16),
        "model.layers.0.mlp.up_proj.weight": (24, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 24),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    directory: Path, config: dict | None = None, weights: dict | None = None, tokens: int | None = 32
) -> Path:
    """A checkpoint in `directory`; with a tokenizer of `tokens` words unless that is None."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    save_file(tensors() if weights is None else weights, directory / "model.safetensors")
    if tokens is not None:
        write_tokenizer(directory, tokens)
    return directory


def write_tokenizer(directory: Path, tokens: int) -> None:
    """A tokenizer of the words w0, w1, ... between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
