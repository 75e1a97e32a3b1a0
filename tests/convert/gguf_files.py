"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.convert.checkpoints import LLAMA, random_tensors

# Rows of 256 values, so that every type has whole blocks.
WIDE = {
    **LLAMA,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 1,
}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġab"]
CHAT = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves of a head's rows interleaved, as llama.cpp's converter does."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: Path,
    config: Mapping[str, Any] = LLAMA,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    architecture: str = "llama",
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    words: Sequence[str] | None = WORDS,
    merges: Sequence[str] = ("a b", "Ġ ab"),
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The file that holds these Hugging Face tensors, matrices packed as `kind`."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if words is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(list(words))
        writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
        writer.add_token_merges(list(merges))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(CHAT)
    for name, value in (metadata or {}).items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add = writer.add_float32 if isinstance(value, float) else add
        add = writer.add_array if isinstance(value, list) else add
        (writer.add_uint32 if type(value) is int else add)(name, value)
    for name, tensor in stored(config, tensors, architecture).items():
        packed = kind if tensor.ndim == 2 else "F32"
        number = gguf.GGMLQuantizationType[packed]
        writer.add_tensor(name, pack(tensor, packed), raw_dtype=number)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None, architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """Hugging Face tensors under llama.cpp's names, with its order of rows and its norms."""
    number = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    translate = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    result = {}
    for name, tensor in (random_tensors(config) if tensors is None else tensors).items():
        module, _, field = name.rpartition(".")
        if architecture in ("llama", "granite", "smollm3", "mistral3"):
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            projection = module.rpartition(".")[2]
            tensor = permuted(tensor, config[heads[projection]]) if projection in heads else tensor
        offset = 1.0 if architecture == "gemma3" and "norm" in name else 0.0
        result[f"{translate.get_name(module)}.{field}"] = tensor + np.float32(offset)
    return result


def pack(tensor: np.ndarray, kind: str) -> np.ndarray:
    """As gguf quantizes; of types that it only reads, random bytes with finite scales."""
    number = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(tensor, number)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, number)
        bytes_ = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        block = gguf.GGML_QUANT_SIZES[number][1]
        blocks = bytes_.reshape(-1, block)
        for at in SCALES[kind]:
            blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return bytes_


# Where a block of these keeps its scales in half precision.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
