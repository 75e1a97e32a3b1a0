"""Every tensor of a Hugging Face directory reaches its parameter, or all that is wrong is said."""

import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import convert.hf
from convert.errors import CheckpointError
from convert.hf import load_hf
from kivi_jax.checks import warn_once
from kivi_jax.model.rope import rope_frequencies
from tests.convert.checkpoints import LLAMA, random_tensors, write_checkpoint, write_tokenizer

TIED = {**LLAMA, "tie_word_embeddings": True}


def test_tensors_land_in_their_places(tmp_path):
    tensors = random_tensors(LLAMA)
    model = load_hf(write_checkpoint(tmp_path, tensors=tensors), dtype="float32")
    layer = model.layers[1]
    for got, name in (
        (layer.attention.output, "self_attn.o_proj"),
        (layer.mlp.gate, "mlp.gate_proj"),
        (layer.mlp.up, "mlp.up_proj"),
        (layer.mlp.down, "mlp.down_proj"),
    ):
        np.testing.assert_array_equal(got.kernel[...], tensors[f"model.layers.1.{name}.weight"].T)
    projections = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(layer.attention.query_key_value.kernel[...], np.concatenate(projections).T)
    np.testing.assert_array_equal(
        layer.attention_norm.scale[...], tensors["model.layers.1.input_layernorm.weight"]
    )
    np.testing.assert_array_equal(
        layer.mlp_norm.scale[...], tensors["model.layers.1.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(model.embed.embedding[...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.norm.scale[...], tensors["model.norm.weight"])
    np.testing.assert_array_equal(model.lm_head.kernel[...], tensors["lm_head.weight"].T)
    leaves = jax.tree.leaves(nnx.state(model))
    assert len(leaves) == len(tensors) - 2 * len(model.layers)  # three are one parameter
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_cast(tmp_path, stored, dtype):
    tensors = random_tensors(LLAMA, stored)
    model = load_hf(write_checkpoint(tmp_path, tensors=tensors), dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {dtype}
    expected = tensors["lm_head.weight"].T.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(model.lm_head.kernel[...], expected)


def test_biases_of_queries_keys_and_values_stand_side_by_side(tmp_path):
    tensors = random_tensors(LLAMA)
    biases = {
        name.replace("weight", "bias"): np.random.default_rng(len(name)).random(len(tensor), np.float32)
        for name, tensor in tensors.items()
        if "self_attn" in name
    }
    directory = write_checkpoint(tmp_path, {**LLAMA, "attention_bias": True}, tensors | biases)
    attention = load_hf(directory, dtype="float32").layers[0].attention
    expected = [biases[f"model.layers.0.self_attn.{name}_proj.bias"] for name in "qkv"]
    np.testing.assert_array_equal(attention.query_key_value.bias[...], np.concatenate(expected))
    np.testing.assert_array_equal(attention.output.bias[...], biases["model.layers.0.self_attn.o_proj.bias"])


def test_shards_give_the_same_model_and_progress_counts_tensors(tmp_path):
    single = load_hf(write_checkpoint(tmp_path / "single"), dtype="float32")
    seen = []
    sharded = load_hf(
        write_checkpoint(tmp_path / "sharded", shards=3),
        dtype="float32",
        progress=lambda done, total: seen.append((done, total)),
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(single), nnx.state(sharded))
    count = len(random_tensors(LLAMA))
    assert seen == [(i + 1, count) for i in range(count)]


def test_a_second_copy_in_another_layout_is_not_read(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    load_hf(tmp_path, dtype="float32")


def test_inverse_frequencies_of_old_checkpoints_are_left_out(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    model = load_hf(write_checkpoint(tmp_path, tensors=tensors), dtype="float32")
    assert rope_frequencies(model.config, model.config.rope, jnp.array([1]))[0][0, 1] != 1


def test_a_tied_head_may_be_saved_again_but_not_differ(tmp_path):
    tensors = random_tensors(TIED)
    embedding = tensors["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "same", TIED, {**tensors, "lm_head.weight": embedding})
    assert not hasattr(load_hf(tmp_path / "same", dtype="float32"), "lm_head")
    write_checkpoint(tmp_path / "other", TIED, {**tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_hf(tmp_path / "other", dtype="float32")


def test_all_errors_are_reported_together(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((32, 32), np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_hf(write_checkpoint(tmp_path, tensors=tensors), dtype="float32")
    for said in (
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is not a tensor of this model",
        "model.layers.0.mlp.down_proj.weight has shape [48, 32], config.json asks for [32, 48]",
        "model.layers.0.mlp.up_proj.weight has type I8",
        "model.layers.1.self_attn.v_proj.weight is missing",
        "model.layers.1.self_attn.k_proj.weight has shape [32, 32], config.json asks for [16, 32]",
    ):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(directory):
    (directory / "model.safetensors").write_bytes(b"\x10")


def pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def empty(directory):
    (directory / "model.safetensors").unlink()


def lost_shard(directory):
    write_checkpoint(directory, shards=2)
    (directory / "model.safetensors").unlink()
    (directory / "model-00002-of-00002.safetensors").unlink()


def bad_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def index_that_leads_away(directory):
    (directory / "model.safetensors").rename(directory.parent / "others.safetensors")
    index = {"weight_map": {"model.norm.weight": "../others.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def twice(directory):
    index = {"weight_map": {"a": "model.safetensors.1", "b": "model.safetensors.2"}}
    content = (directory / "model.safetensors").read_bytes()
    for name in index["weight_map"].values():
        (directory / name).write_bytes(content)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def large_tokenizer(directory):
    write_tokenizer(directory, 62)


def broken_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{}")


DAMAGE = {
    truncate: "model.safetensors cannot be read",
    truncate_header: "model.safetensors cannot be read",
    pickle: "pytorch_model.bin.*save it as safetensors first",
    empty: "holds no *.safetensors weights",
    lost_shard: "lacks shards that its index names: model-00002-of-00002.safetensors",
    bad_index: "must map tensors to files",
    index_that_leads_away: "names '../others.safetensors', which is no file beside it",
    twice: "is in model.safetensors.1 and in model.safetensors.2",
    large_tokenizer: "ids up to 61, but config.json says vocab_size=61",
    broken_tokenizer: "tokenizer.json cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(tmp_path, damage):
    write_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(DAMAGE[damage]).replace(r"\.\*", ".*")):
        load_hf(tmp_path, dtype="float32")


def test_a_tokenizer_that_fits_is_accepted(tmp_path):
    write_checkpoint(tmp_path)
    write_tokenizer(tmp_path, 61)
    load_hf(tmp_path, dtype="float32")


def test_a_tied_matrix_may_have_the_heads_name_only(tmp_path):
    tensors = random_tensors(TIED)
    embedding = tensors.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path, TIED, {**tensors, "lm_head.weight": embedding})
    model = load_hf(tmp_path, dtype="float32")
    np.testing.assert_array_equal(model.embed.embedding[...], embedding)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, stored):
    tensors = random_tensors(LLAMA, stored)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = value
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight has values that are infin"
    ):
        load_hf(tmp_path, dtype="float32")


def test_weights_too_large_for_float16_are_said_and_refused_in_it(tmp_path, caplog):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"][0] = -1e5
    write_checkpoint(tmp_path, tensors=tensors)
    warn_once.cache_clear()
    load_hf(tmp_path, dtype="bfloat16")
    assert "model.norm.weight has values up to 1.0e+05, as no trained weights have" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values too large for float16"):
        load_hf(tmp_path, dtype="float16")


@pytest.mark.parametrize("layers", [3, 300])
def test_layers_without_weights_are_noticed_before_shapes_are_made(tmp_path, layers, monkeypatch):
    monkeypatch.setattr(convert.hf, "abstract_parameters", None)
    write_checkpoint(tmp_path, {**LLAMA, "num_hidden_layers": layers}, random_tensors(LLAMA))
    with pytest.raises(CheckpointError, match=f"says num_hidden_layers={layers}, but there are weights of 2"):
        load_hf(tmp_path, dtype="float32")


def test_a_pipe_is_not_waited_for(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_hf(tmp_path, dtype="float32")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_too_deep_to_read_is_one_line(tmp_path, name):
    write_checkpoint(tmp_path, tokens=61)
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"is not valid JSON"):
        load_hf(tmp_path, dtype="float32")


def test_a_padding_token_needs_no_embedding_and_another_token_does(tmp_path):
    """Llama-2-13b was published so: no text becomes that token."""
    write_checkpoint(tmp_path, {**LLAMA, "vocab_size": 60}, tokens=61)
    last = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    settings = tmp_path / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    for pad in (max(last, key=last.get), {"content": max(last, key=last.get)}):
        settings.write_text(json.dumps(written | {"pad_token": pad}))
        load_hf(tmp_path, dtype="float32")
    settings.write_text(json.dumps(written | {"pad_token": min(last, key=last.get)}))
    with pytest.raises(CheckpointError, match="the tokenizer has ids up to 60"):
        load_hf(tmp_path, dtype="float32")
