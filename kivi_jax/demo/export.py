"""A trained model as a Hugging Face directory: what `kivi_jax.load` and `transformers` read."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert.rules import sources_of
from kivi_jax.config import ModelConfig
from kivi_jax.demo import tokenizer
from kivi_jax.model.llama import Llama


def export(model: Llama, directory: Path) -> None:
    """Write config, weights in bfloat16, and the tokenizer into `directory`, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    special = tokenizer.build()
    ids = {
        f"{role}_token_id": special.token_to_id(token)
        for role, token in (("bos", tokenizer.BEGIN), ("eos", tokenizer.END), ("pad", tokenizer.PAD))
    }
    save_file(_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", {**_config(model.config), **ids})
    _write_json(directory / "generation_config.json", {"do_sample": False, **ids})
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(model.config))
    special.save(str(directory / "tokenizer.json"))


def _tensors(model: Llama) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    tensors: dict[str, np.ndarray] = {}
    for path, value in leaves:
        parameter = np.asarray(value.astype(jnp.bfloat16))
        for source in sources_of(tuple(str(key.key) for key in path), model.config):
            tensors[source.name] = np.ascontiguousarray(source.part_of(parameter))
    return tensors


def _config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def _tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.BEGIN,
        "eos_token": tokenizer.END,
        "pad_token": tokenizer.PAD,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
