"""GGUF files: values are the gguf package's own, each in its place; what is wrong is one line."""

import json
import re
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import kivi_jax as kj
from convert.errors import CheckpointError
from convert.gguf.config import ARCHITECTURES, config_of
from convert.gguf.file import read_gguf
from convert.gguf.load import load_gguf, load_gguf_tokenizer, write_beside
from convert.gguf.tensors import tensors_of
from convert.hf import load_hf
from tests.convert.checkpoints import LLAMA, family_tensors, random_tensors, write_checkpoint
from tests.convert.gguf_files import WIDE, pack, permuted, stored, write_gguf

FLOATS = ["F32", "F16", "BF16"]
PACKED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def test_a_file_and_its_hugging_face_source_are_the_same_model(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    ours, source = (
        load_gguf(file, dtype="float32"),
        load_hf(write_checkpoint(tmp_path / "hf"), dtype="float32"),
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(source))
    assert ours.config.eos_ids == (2,)
    assert ours.config.rope == source.config.rope
    assert (ours.config.head_dim, ours.config.vocab_size) == (8, 61)


@pytest.mark.parametrize("kind", FLOATS + PACKED)
def test_values_are_those_that_gguf_dequantizes(tmp_path, kind):
    file = write_gguf(tmp_path / "model.gguf", WIDE, kind=kind)
    tensors = read_gguf(file).tensors
    number = gguf.GGMLQuantizationType[kind]
    for name, tensor in stored(WIDE, None).items():
        expected = gguf.dequantize(pack(tensor, kind), number) if tensor.ndim == 2 else tensor
        for dtype in ("float32", jnp.bfloat16):
            np.testing.assert_array_equal(tensors[name].read(dtype), expected.astype(dtype))


def test_packed_rotary_rows_return_to_halves(tmp_path):
    model = load_gguf(write_gguf(tmp_path / "model.gguf", WIDE, kind="Q4_1"), dtype="float32")
    weights = random_tensors(WIDE)["model.layers.0.self_attn.q_proj.weight"]
    packed = pack(permuted(weights, 4), "Q4_1")
    rows = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1).reshape(4, 32, 2, 256)
    expected = rows.swapaxes(1, 2).reshape(256, 256)
    got = model.layers[0].attention.query_key_value.kernel[...][:, :256].T
    np.testing.assert_array_equal(got, expected)


def test_tensors_longer_than_a_block_of_rows_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.gguf.file._BLOCK", 256 * 7)
    block = read_gguf(write_gguf(tmp_path / "model.gguf", WIDE, kind="Q8_0")).tensors["token_embd.weight"]
    packed = pack(random_tensors(WIDE)["model.embed_tokens.weight"], "Q8_0")
    np.testing.assert_array_equal(
        block.read("float32"), gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    )


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path):
    model, tokenizer = kj.load(write_gguf(tmp_path / "model.gguf"), dtype="float32")
    assert tokenizer("ab ab  c<s>")["input_ids"] == [30, 31, 29, 29, 5, 1]
    assert tokenizer.decode([30, 31, 29, 29, 5, 2], skip_special_tokens=True) == "ab ab  c"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert (rendered, tokenizer.eos_token) == ("<s>ab", "</s>")
    assert model.config.vocab_size == 61


def test_what_stands_beside_a_converted_file_reads_the_same(tmp_path):
    from kivi_jax.generation.loading import load_tokenizer

    file = write_gguf(tmp_path / "model.gguf")
    write_beside(file, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("ab c</s>")["input_ids"] == load_gguf_tokenizer(file)("ab c</s>")["input_ids"]
    assert again.chat_template == load_gguf_tokenizer(file).chat_template
    assert json.loads((tmp_path / "config.json").read_text()) == config_of(read_gguf(file))


def test_sentencepiece_merges_follow_the_order_of_pieces(tmp_path):
    words = ["<unk>", "<s>", "</s>", "<0x21>", "▁a", "ab", "▁ab", "▁", "a", "b", "  "]
    metadata = {"tokenizer.ggml.add_bos_token": True}
    file = write_gguf(tmp_path / "model.gguf", words=None, metadata={})
    parts = read_gguf(file)
    said = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.bos_token_id": 1,
        **metadata,
    }
    from convert.gguf.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(parts._replace(metadata=parts.metadata | said))
    assert tokenizer("abb!")["input_ids"] == [1, 6, 9, 3]  # ▁a is learned first, then it takes a b
    assert tokenizer.decode([1, 6, 9, 3], skip_special_tokens=True) == "abb!"


def test_the_header_says_what_the_gguf_package_reads(tmp_path):
    said = {"general.name": "Ġ ✓", "general.flag": True, "general.third": 1 / 3, "general.many": 2**31}
    file = write_gguf(tmp_path / "model.gguf", WIDE, kind="Q4_K", metadata=said)
    theirs, ours = gguf.GGUFReader(file), read_gguf(file)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == {name: field.contents() for name, field in fields.items()}
    for tensor in theirs.tensors:
        block = ours.tensors[tensor.name]
        assert block.shape == tuple(reversed(tensor.shape))
        assert (block.offset, block.end - block.offset) == (tensor.data_offset, tensor.n_bytes)
        assert block.kind == tensor.tensor_type


def test_no_tokenizer_is_none(tmp_path):
    assert load_gguf_tokenizer(write_gguf(tmp_path / "model.gguf", words=None)) is None


def test_llama_3_frequencies_are_recognized(tmp_path):
    rope = {"rope_theta": 500000.0}
    config = {**LLAMA, "rope_parameters": rope, "head_dim": 64, "num_attention_heads": 2, "hidden_size": 32}
    turns = 8192 * rope["rope_theta"] ** (-np.arange(0, 64, 2) / 64) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    assert factors.max() == 32
    assert factors.min() == 1
    file = write_gguf(tmp_path / "model.gguf", config, extra={"rope_freqs.weight": factors})
    assert convert.read_any_config(file).rope.kind == "llama3"
    assert convert.read_any_config(file).rope.factor == 32
    file = write_gguf(tmp_path / "other.gguf", config, extra={"rope_freqs.weight": factors + 1})
    with pytest.raises(CheckpointError, match=r"scales rotary frequencies \(rope_freqs.weight\) otherwise"):
        convert.read_any_config(file)


# What a config.json says of each beyond Llama's attributes, and what its GGUF file says for it.
KNOWN = {
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "smollm3": (dict(tie_word_embeddings=True), {}),
    "phi3": (dict(sliding_window=None), {"phi3.attention.sliding_window": 0}),
    "gemma3": (
        dict(sliding_window=16, query_pre_attn_scalar=8, tie_word_embeddings=True, rope_parameters=None),
        {"gemma3.attention.sliding_window": 16},
    ),
    "granite": (
        dict(attention_multiplier=0.5, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=8.0),
        {
            "granite.attention.scale": 0.5,
            "granite.embedding_scale": 2.0,
            "granite.residual_scale": 0.5,
            "granite.logit_scale": 8.0,
        },
    ),
    "mistral3": (
        dict(
            model_type="ministral3",
            rope_parameters=dict(
                rope_theta=1e4,
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.25,
            ),
        ),
        {
            "mistral3.rope.scaling.type": "yarn",
            "mistral3.rope.scaling.factor": 4.0,
            "mistral3.rope.scaling.yarn_beta_fast": 32.0,
            "mistral3.rope.scaling.yarn_beta_slow": 1.0,
            "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
            "mistral3.rope.scaling.original_context_length": 32,
            "mistral3.attention.temperature_scale": 0.25,
        },
    ),
    "olmo2": ({}, {}),
    "olmo3": (
        dict(
            model_type="olmo3",
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": dict(
                    rope_theta=1e4,
                    rope_type="yarn",
                    factor=4.0,
                    attention_factor=1.25,
                    original_max_position_embeddings=64,
                ),
                "sliding_attention": dict(rope_theta=1e4, rope_type="default"),
            },
        ),
        {
            "olmo2.attention.sliding_window": 16,
            "olmo2.attention.sliding_window_pattern": [False, True],
            "olmo2.rope.scaling.type": "yarn",
            "olmo2.rope.scaling.factor": 4.0,
            "olmo2.rope.scaling.attn_factor": 1.25,
            "olmo2.rope.scaling.original_context_length": 64,
        },
    ),
}


@pytest.mark.parametrize("family", KNOWN)
def test_files_of_every_family_are_the_same_model_as_its_checkpoint(tmp_path, family):
    attributes, metadata = KNOWN[family]
    architecture = "olmo2" if family == "olmo3" else family
    config = LLAMA | {"model_type": ARCHITECTURES[architecture].model_type} | attributes
    tensors = family_tensors(config)
    written = {**config, "rope_parameters": {"rope_theta": 1e6 if architecture == "gemma3" else 1e4}}
    file = write_gguf(
        tmp_path / "m.gguf", written, tensors, architecture=architecture, metadata=metadata, words=None
    )
    ours = load_gguf(file, dtype="float32")
    source = load_hf(write_checkpoint(tmp_path / "hf", config, tensors), dtype="float32")
    for got, expected in zip(
        jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(source)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)  # norms less one are rounded
    same = dict(eos_ids=(), rms_norm_eps=1e-5)  # this file has no tokenizer, and its epsilon in 32 bits
    assert replace(ours.config, **same) == replace(source.config, **same)


def test_every_architecture_has_a_file():
    assert {"llama", *KNOWN} - {"olmo3"} == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("architecture", "metadata", "expected"),
    [
        ("qwen2", {}, {"model_type": "qwen2", "head_dim": 8}),
        ("qwen3", {}, {"model_type": "qwen3", "head_dim": 8}),
        ("smollm3", {}, {"model_type": "smollm3"}),
        ("olmo2", {}, {"model_type": "olmo2"}),
        (
            "granite",
            {"granite.attention.scale": 0.5, "granite.logit_scale": 8.0},
            {"attention_multiplier": 0.5, "logits_scaling": 8.0},
        ),
        (
            "gemma3",
            {"gemma3.attention.sliding_window": 16, "gemma3.rope.scaling.type": "linear"},
            {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 8},
        ),
        (
            "phi3",
            {"phi3.attention.sliding_window": 0, "phi3.rope.dimension_count": 6},
            {"sliding_window": None, "partial_rotary_factor": 0.75},
        ),
        (
            "llama",
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
    ],
)
def test_metadata_become_the_attributes_of_config_json(tmp_path, architecture, metadata, expected):
    tensors = {"model.embed_tokens.weight": np.zeros((61, 32), np.float32)}
    file = write_gguf(tmp_path / "m.gguf", tensors=tensors, architecture=architecture, metadata=metadata)
    config = config_of(read_gguf(file))
    assert config | expected == config
    assert (config["tie_word_embeddings"], config["vocab_size"], config["eos_token_id"]) == (True, 61, 2)


def cut_metadata(file):
    file.write_bytes(file.read_bytes()[:200])


def cut_tensors(file):
    file.write_bytes(file.read_bytes()[:-5000])


def no_gguf(file):
    file.write_bytes(b"PK" + bytes(200))


def unknown_architecture(file):
    write_gguf(file, architecture="mamba", tensors={})


def unknown_metadata(file):
    write_gguf(file, metadata={"llama.expert_count": 8})


def lacking_metadata(file):
    write_gguf(file, {**LLAMA}, architecture="llama", metadata={"split.count": 2})


def no_embeddings(file):
    write_gguf(file, tensors={})


def too_many_tokens(file):
    write_gguf(file, words=["<s>", "<unk>", "a", "b", "Ġ", "ab", "Ġab", *(f"w{i}" for i in range(60))])


def too_few_layers(file):
    tensors = {name: t for name, t in random_tensors(LLAMA).items() if "layers.1" not in name}
    write_gguf(file, tensors=tensors)


def big_endian(file):
    write_gguf(file)
    content = bytearray(file.read_bytes())
    content[4:8] = content[7:3:-1]
    file.write_bytes(content)


def other_version(file):
    write_gguf(file)
    content = bytearray(file.read_bytes())
    content[4] = 1
    file.write_bytes(content)


def twice(file):
    write_gguf(file, extra={"output_norm.Weight": np.zeros(32, np.float32)})
    file.write_bytes(file.read_bytes().replace(b"output_norm.Weight", b"output_norm.weight"))


def aligned_to_nothing(file):
    write_gguf(file, metadata={"general.alignment": 0})


DAMAGE = {
    big_endian: "is of another byte order: download the little-endian file",
    other_version: "cannot be read as GGUF .its version is 1, not 2 or 3",
    twice: "cannot be read as GGUF .it holds output_norm.weight twice",
    aligned_to_nothing: "cannot be read as GGUF .its general.alignment is 0",
    too_few_layers: "says block_count=2, but there are tensors of 1",
    cut_metadata: "cannot be read as GGUF .it ends early",
    cut_tensors: "cannot be read as GGUF .it ends early",
    no_gguf: "cannot be read as GGUF .GGUF magic invalid",
    unknown_architecture: "has architecture 'mamba', which is not supported: choose a file of llama",
    unknown_metadata: "may change what the model computes and that is not supported: expert_count=8",
    lacking_metadata: "is one of 2 files of a model: merge them",
    no_embeddings: "has no tensor token_embd.weight",
    too_many_tokens: "has 67 tokens, but embeddings of 61",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line(tmp_path, damage):
    file = write_gguf(tmp_path / "model.gguf")
    damage(file)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        load_gguf(file, dtype="float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "a tokenizer of kind 'rwkv', which is not supported"),
        ({"tokenizer.ggml.pre": "runes"}, "splits text as 'runes' does"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "cannot be built"),
        ({"tokenizer.ggml.bos_token_id": -5}, "cannot be built"),
        ({"tokenizer.ggml.bos_token_id": 99}, "cannot be built"),
    ],
)
def test_tokenizers_that_cannot_be_built_are_named(tmp_path, said, message):
    from convert.gguf.tokenizer import read_tokenizer

    parts = read_gguf(write_gguf(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(parts._replace(metadata=parts.metadata | said))


@pytest.mark.parametrize("value", ["2", [2, 2], 0])
@pytest.mark.parametrize("key", ["attention.head_count", "embedding_length", "rope.freq_base"])
def test_sizes_are_positive_numbers(tmp_path, key, value):
    parts = read_gguf(write_gguf(tmp_path / "model.gguf"))
    said = re.escape(f"not supported: {key}={value!r}")
    with pytest.raises(CheckpointError, match=said):
        config_of(parts._replace(metadata=parts.metadata | {f"llama.{key}": value}))


def test_as_many_kv_heads_as_heads_need_not_be_said(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", LLAMA | dict(num_key_value_heads=4))
    parts = read_gguf(file)
    said = dict(parts.metadata)
    del said["llama.attention.head_count_kv"]
    name = "model.layers.0.self_attn.k_proj.weight"
    (found, expected) = (tensors_of(parts._replace(metadata=m), [name])[name] for m in (said, parts.metadata))
    np.testing.assert_array_equal(found.read(None), expected.read(None))


@pytest.mark.parametrize("number", [-1, 2**32 - 1])
def test_a_special_token_that_is_none_is_none(tmp_path, number):
    from convert.gguf.tokenizer import read_tokenizer

    parts = read_gguf(write_gguf(tmp_path / "model.gguf"))
    said = {"tokenizer.ggml.eos_token_id": number, "tokenizer.ggml.bos_token_id": number}
    tokenizer = read_tokenizer(parts._replace(metadata=parts.metadata | said))
    assert (tokenizer.eos_token, tokenizer.bos_token) == (None, None)


def test_a_file_without_needed_metadata_says_which(tmp_path):
    parts = read_gguf(write_gguf(tmp_path / "model.gguf"))
    del parts.metadata["llama.block_count"]
    with pytest.raises(CheckpointError, match="lacks metadata that its model needs: block_count"):
        config_of(parts)
