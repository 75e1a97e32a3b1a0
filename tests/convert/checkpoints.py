"""Hugging Face directories for tests, written without transformers so that they can also be wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.hf import abstract_parameters
from convert.rules import model_config, sources_of
from convert.tensors import fused

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def random_tensors(config: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors that transformers saves for this config, [out, in], without biases."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    random = np.random.default_rng(0)
    return {
        name: (0.1 * random.standard_normal(shape, np.float32)).astype(dtype)
        for name, shape in shapes.items()
    }


def family_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`random_tensors` of any family, under the names that its checkpoints have."""
    ours = model_config(config)
    random = np.random.default_rng(0)
    tensors = {
        source.name: 0.3 * random.standard_normal(source.part_of(np.empty(leaf.shape)).shape, np.float32)
        for path, leaf in abstract_parameters(ours, "float32").items()
        for source in sources_of(path, ours)
    }
    for name in tensors:
        if "norm" in name:
            tensors[name] += np.float32(1 - ours.norm_offset)
    if config["model_type"] != "phi3":
        return tensors
    parts: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(fused(name), []).append(tensor)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any] = LLAMA,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
    tokens: int | None = None,
) -> Path:
    """A directory as `save_pretrained` would leave it, in one file or in several with an index.

    With `tokens`, a tokenizer of so many words stands beside.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tokens is not None:
        write_tokenizer(directory, tokens)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = dict(random_tensors(config) if tensors is None else tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_tokenizer(directory: Path, size: int) -> None:
    """A tokenizer of the words w0, w1, ... between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
