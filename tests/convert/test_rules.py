"""What a config.json means, and which ones are refused by name."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from convert.attributes import reads
from convert.errors import CheckpointError
from convert.families import FAMILIES, REFUSED
from convert.hf import abstract_parameters, read_config
from convert.rules import model_config, sources_of
from kivi_jax.config import RopeConfig
from tests.convert.checkpoints import LLAMA, random_tensors

MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def llama(**changes):
    return {**LLAMA, **changes}


def test_every_field_is_read():
    config = model_config(llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-4))
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (61, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (128, 1e-4)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (True, True, False)
    assert (config.sliding_window, config.eos_ids, config.rope) == (None, (2,), RopeConfig())


@pytest.mark.parametrize("case", ["a_gqa_tied", "c_linear_rope", "e_mistral_sliding16"])
def test_both_spellings_mean_the_same(shared, case):
    new, legacy = (
        json.loads((shared / "golden" / "hf" / case / name).read_text())
        for name in ("config.json", "config_legacy.json")
    )
    assert "rope_parameters" in new
    assert "rope_parameters" not in legacy
    assert model_config(new) == model_config(legacy)


def test_sizes_left_out_are_derived():
    raw = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
    assert (model_config(raw).head_dim, model_config(raw).num_kv_heads) == (8, 4)
    assert model_config(llama(head_dim=None)).head_dim == 8
    assert model_config(llama(head_dim=12)).head_dim == 12


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 7], None, (2, 7)),
        (None, None, ()),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        (2, {"temperature": 0.6}, (2,)),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(eos, generation, expected):
    assert model_config(llama(eos_token_id=eos), generation).eos_ids == expected


def test_mistral_has_a_window_and_no_biases():
    assert model_config({**MISTRAL, "sliding_window": 16}).sliding_window == 16
    assert model_config({**MISTRAL, "sliding_window": None}).sliding_window is None
    assert model_config(MISTRAL).sliding_window == 4096  # transformers' default
    assert not model_config({**MISTRAL, "attention_bias": True}).attention_bias  # its code does not read it


ROPES = {
    "linear": (dict(rope_type="linear", factor=4.0), RopeConfig(kind="linear", factor=4.0)),
    "dynamic": (dict(type="dynamic", factor=2.0), RopeConfig(kind="dynamic", factor=2.0)),
    "llama3": (
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=2.0,
            high_freq_factor=5.0,
            original_max_position_embeddings=32,
        ),
        RopeConfig(
            kind="llama3",
            factor=8.0,
            low_freq_factor=2.0,
            high_freq_factor=5.0,
            original_max_position_embeddings=32,
        ),
    ),
    "yarn": (
        dict(
            rope_type="yarn",
            factor=4.0,
            beta_fast=20,  # an integer, as in many files
            truncate=False,
            mscale=0.7,
            original_max_position_embeddings=32,
        ),
        RopeConfig(
            kind="yarn",
            factor=4.0,
            beta_fast=20.0,
            truncate=False,
            mscale=0.7,
            original_max_position_embeddings=32,
        ),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("legacy", [False, True])
def test_rope_scaling_is_read_in_both_spellings(kind, legacy):
    written, expected = ROPES[kind]
    if legacy:
        raw = {k: v for k, v in LLAMA.items() if k != "rope_parameters"}
        raw |= {"rope_theta": 10000.0, "rope_scaling": written}
    else:
        raw = llama(rope_parameters={**written, "rope_theta": 10000.0})
    before = json.dumps(raw)
    assert model_config(raw).rope == expected
    assert json.dumps(raw) == before, "the caller's dictionary is not written to"


def test_rope_theta_is_read_in_both_spellings():
    assert model_config(llama(rope_parameters={"rope_theta": 5e5})).rope.theta == 5e5
    raw = {k: v for k, v in LLAMA.items() if k != "rope_parameters"}
    assert model_config({**raw, "rope_theta": 1e6, "rope_scaling": None}).rope.theta == 1e6


IMPOSSIBLE = {
    "model_type='gpt2' is not supported: choose a checkpoint of llama": dict(model_type="gpt2"),
    "hidden_act": dict(hidden_act="gelu"),
    "quantization_config": dict(quantization_config={"quant_method": "gptq"}),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
    "is_causal": dict(is_causal=False),
    "per_layer_config": dict(per_layer_config={"0": {"head_dim": 4}}),
    "sliding_window": dict(sliding_window=16),  # transformers' cache reads it, its Llama does not
    "layer_types": dict(layer_types=["full_attention", "sliding_attention"]),
    "attention_chunk_size": dict(attention_chunk_size=8),
    "longrope": dict(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
    "'su'": dict(rope_scaling={"type": "su", "factor": 2.0}),
    "by kind of layer": dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
    "factor": dict(rope_parameters={"rope_type": "linear"}),
    "could not convert": dict(rope_parameters={"rope_type": "linear", "factor": "four"}),
    "vocab_size": dict(vocab_size="many"),
    "num_layers": dict(num_hidden_layers=-1),
    "rope_scaling": dict(rope_scaling=[1], rope_parameters=None),
    "num_kv_heads": dict(num_key_value_heads=3),
    "eos_token_id": dict(eos_token_id="</s>"),
    "value .1, 'two'.": dict(eos_token_id=[1, "two"]),
    "model_type=": dict(model_type=["llama"]),
    "rms_norm_eps=nan": dict(rms_norm_eps=float("nan")),
    "rms_norm_eps=-": dict(rms_norm_eps=-1e-5),
    "'theta': 0": dict(rope_parameters={"rope_theta": 0}),
    "'theta': -": dict(rope_parameters=None, rope_theta=-10000.0),
    "'theta': nan": dict(rope_parameters={"rope_theta": float("nan")}),
    "'theta': inf": dict(rope_parameters={"rope_theta": float("inf")}),
    "'factor': 0": dict(rope_parameters={"rope_type": "linear", "factor": 0}),
    "'factor': -": dict(rope_parameters={"rope_type": "dynamic", "factor": -2}),
    "'factor': nan": dict(rope_parameters={"rope_type": "linear", "factor": float("nan")}),
    "truncate": dict(rope_parameters=ROPES["yarn"][0] | {"truncate": "false"}),
    "mscale": dict(rope_parameters=ROPES["yarn"][0] | {"mscale": float("inf")}),
    "high_freq_factor": dict(rope_parameters=ROPES["llama3"][0] | {"high_freq_factor": 2.0}),
}


@pytest.mark.filterwarnings("ignore")  # transformers has its own opinion of some of these
@pytest.mark.parametrize("named", IMPOSSIBLE)
def test_what_we_cannot_compute_is_refused_by_name(named):
    with pytest.raises(CheckpointError, match=named):
        model_config(llama(**IMPOSSIBLE[named]))


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_cannot_be_read_are_refused_with_the_reason(model_type):
    from transformers import CONFIG_MAPPING

    assert model_type in CONFIG_MAPPING
    assert model_type not in FAMILIES
    with pytest.raises(CheckpointError, match=f"model_type='{model_type}' cannot be read: .*{REASONS}"):
        model_config(llama(model_type=model_type))


REASONS = "(soft cap|mixture of experts|not attention over keys and values)"


def test_a_family_that_transformers_does_not_know_yet_says_so(monkeypatch):
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {})
    with pytest.raises(CheckpointError, match="does not know model_type='llama': upgrade it"):
        model_config(LLAMA)


def test_all_that_is_not_supported_is_named_together():
    with pytest.raises(CheckpointError, match=r"hidden_act='gelu', is_causal=False"):
        model_config(llama(hidden_act="gelu", is_causal=False))


def test_the_end_in_a_generation_config_is_a_number_too():
    with pytest.raises(CheckpointError, match="eos_token_id must be a token's number or several, got '</s>'"):
        model_config(LLAMA, {"eos_token_id": "</s>"})


SILENT = dict(
    torch_dtype="bfloat16",
    use_cache=False,
    bos_token_id=1,
    pad_token_id=None,
    attention_dropout=0.1,
    transformers_version="4.40.0",
    initializer_range=0.5,
    pretraining_tp=1,
    partial_rotary_factor=1.0,
    output_attentions=False,  # transformers' default
    _name_or_path="./llama",
    auto_map={"AutoModel": "modeling.Model"},
    quantization_config=None,
    layer_types=["full_attention"] * 2,
)
NAMED = {
    **{"_model_name_or_path": "./llama", "transformers.js_config": {}, "unsloth_fixed": True},
    **dict(unsloth_version="2024.9", use_flash_attention_2=True, temperature=0.6, top_p=0.9, do_sample=True),
    **dict(torchscript=False, id2label={"0": "a", "1": "b"}, max_sequence_length=2048, pretraining_tp=2),
    **dict(logit_scale=0.25, rope_interleaved=True, name_or_path=3, use_return_dict=False),
}


def test_attributes_without_effect_are_accepted(caplog):
    assert model_config(llama(**SILENT)) == model_config(LLAMA)
    assert not caplog.records


def test_what_transformers_does_not_read_is_named_once(caplog):
    """design.md, section 9: it cannot change the result."""
    for _ in range(2):
        rope = LLAMA["rope_parameters"] | {"mrope_section": [2, 2]}
        assert model_config(llama(**NAMED, rope_parameters=rope)) == model_config(LLAMA)
    (record,) = caplog.records
    for name in (*NAMED, "mrope_section of rope_parameters"):
        assert name in record.getMessage()


WITHOUT_EFFECT = {"_attn_implementation", "attention_dropout", "pad_token_id"}
ALSO_WITHOUT_EFFECT = {
    "phi3": {"resid_pdrop"},
    "gemma3_text": {
        *("get_text_config", "image_token_id", "mm_tokens_per_image", "text_config", "vision_config"),
    },
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_attribute_that_transformers_code_reads_is_in_the_table(model_type):
    name = model_type.removesuffix("_text")
    package = importlib.util.find_spec(f"transformers.models.{name}").submodule_search_locations[0]
    tree = ast.parse((Path(package) / f"modeling_{name}.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
    }
    fields, only = reads(FAMILIES[model_type])
    assert {"hidden_size", "rms_norm_eps"} <= read
    assert read - fields - only.keys() == WITHOUT_EFFECT | ALSO_WITHOUT_EFFECT.get(model_type, set())


def source_names(raw, field=None):
    """The tensors of all parameters, or of those called `field`."""
    config = model_config(raw)
    paths = [path for path in abstract_parameters(config, "float32") if field in (None, path[-1])]
    return [source.name for path in paths for source in sources_of(path, config)]


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_the_source_of_one_parameter(tied):
    raw = llama(tie_word_embeddings=tied)
    assert sorted(source_names(raw)) == sorted(random_tensors(raw))


def test_biases_have_names_of_their_own():
    biases = source_names(llama(attention_bias=True, mlp_bias=True), "bias")
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(biases) == sorted(f"model.layers.{i}.{module}.bias" for i in range(2) for module in modules)


def test_sources_cover_a_parameter_once():
    config = model_config(llama(num_attention_heads=8, attention_bias=True))
    for path, leaf in abstract_parameters(config, "float32").items():
        covered = np.zeros(leaf.shape, int)
        for source in sources_of(path, config):
            source.part_of(covered)[...] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_config_that_is_missing_or_not_an_object_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
