"""Hugging Face checkpoints: recorded logits, and random ones of every variant against transformers."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import kivi_jax as kj
from convert import CheckpointError, load_model, read_any_config
from convert.hf import load_hf, read_config
from convert.rules import model_config
from tests.convert import checkpoints

GOLDEN = ["a_gqa_tied", "c_linear_rope", "e_mistral_sliding16"]


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_logits(shared, name):
    """Prefill and 32 decoding steps, beyond the window where there is one."""
    directory = shared / "golden" / "hf" / name
    golden, model = np.load(directory / "logits.npz"), load_hf(directory, dtype="float32")
    ids, greedy = golden["p1_ids"], golden["p1_greedy_ids"]
    np.testing.assert_allclose(model(jnp.asarray(ids)[None])[0], golden["p1_prefill_logits"], atol=1e-4)
    logits, cache = model.prefill(
        jnp.asarray(ids)[None], jnp.asarray([len(ids)]), cache=kj.full(), capacity=len(ids) + 33
    )
    np.testing.assert_allclose(logits[0], golden["p1_prefill_logits"][-1], atol=1e-4)
    for token, expected in zip(greedy, golden["p1_decode_logits"], strict=True):
        assert int(logits[0].argmax()) == token
        logits, cache = model.decode(jnp.asarray([token]), cache)
        np.testing.assert_allclose(logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_configs_of_old_and_new_transformers_are_equal(shared, name):
    directory = shared / "golden" / "hf" / name
    new, old = (
        model_config(json.loads((directory / file).read_text()))
        for file in ("config.json", "config_legacy.json")
    )
    assert new == old == read_config(directory)


ROPES = {
    "linear": dict(rope_type="linear", factor=2.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}
VARIANTS = {
    "GQA": {},
    "MHA": dict(num_key_value_heads=4),
    "MQA": dict(num_key_value_heads=1),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=12),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "mistral": dict(sliding_window=9),
    "mistral without window": dict(sliding_window=None),
    **{
        kind: dict(rope_parameters=rope | dict(rope_theta=10000.0), max_position_embeddings=32)
        for kind, rope in ROPES.items()
    },
}


def transformers_model(kind, **changes):
    """A random transformers model in float32, all its parameters but the norms drawn alike."""
    torch = pytest.importorskip("torch")
    import transformers

    fields = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    config = getattr(transformers, f"{kind}Config")(**(fields | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # else zeros and ones, which hide mistakes
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


def assert_same_logits(model, directory, *, width=40, dtype="float32", atol=1e-4):
    import torch

    ids = np.random.default_rng(1).integers(0, 61, (1, width), np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids).long()).logits.float().numpy()
    got = np.asarray(load_hf(directory, dtype=dtype)(jnp.asarray(ids)), np.float32)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_transformers(tmp_path, name):
    model = transformers_model("Mistral" if "mistral" in name else "Llama", **VARIANTS[name])
    model.save_pretrained(tmp_path)
    assert_same_logits(model, tmp_path)


def test_shards(tmp_path):
    model = transformers_model("Llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(model, tmp_path)


def test_bfloat16_weights(tmp_path):
    """Loaded as float32 they are exactly what was saved."""
    model = transformers_model("Llama").bfloat16()
    model.save_pretrained(tmp_path)
    assert_same_logits(type(model).from_pretrained(tmp_path, dtype="float32"), tmp_path)
    assert load_hf(tmp_path, dtype="bfloat16").embed.embedding[...].dtype == jnp.bfloat16


def test_defaults_depend_on_the_model_type():
    """What config.json leaves out is what transformers assumes."""
    llama, mistral = (model_config({"model_type": kind}) for kind in ("llama", "mistral"))
    assert (llama.num_kv_heads, llama.sliding_window, llama.rms_norm_eps) == (32, None, 1e-6)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)


@pytest.mark.parametrize(
    ("raw", "generation", "expected"),
    [
        (dict(eos_token_id=2), None, (2,)),
        (dict(eos_token_id=[2, 5]), None, (2, 5)),
        (dict(eos_token_id=None), None, ()),
        (dict(eos_token_id=2), dict(eos_token_id=[7, 9]), (7, 9)),
        (dict(eos_token_id=2), dict(temperature=1.0), (2,)),
    ],
)
def test_end_tokens(raw, generation, expected):
    assert model_config({"model_type": "llama"} | raw, generation).eos_ids == expected


def test_attributes_that_say_what_is_assumed_anyway_are_harmless():
    model_config({"model_type": "llama", "output_attentions": False, "use_cache": False})
    with pytest.raises(CheckpointError, match="output_attentions=True"):
        model_config({"model_type": "llama", "output_attentions": True})


def test_tensors_that_say_nothing_new_are_ignored(tmp_path):
    weights = checkpoints.tensors()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load_hf(checkpoints.write(tmp_path / "derived", weights=weights), dtype="float32")
    tied = checkpoints.write(tmp_path / "tied", dict(tie_word_embeddings=True))
    load_hf(tied, dtype="float32")  # holds lm_head.weight


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    load_hf(checkpoints.write(tmp_path / "m"), dtype="float32", progress=lambda *count: seen.append(count))
    assert seen == [(done, 12) for done in range(1, 13)]


def test_the_default_dtype_is_float32_on_a_cpu(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("not a CPU")
    model, directory = load_model(str(checkpoints.write(tmp_path / "m")))
    assert directory == tmp_path / "m"
    assert model.embed.embedding[...].dtype == jnp.float32
    assert read_any_config(directory) == model.config


PEAK = """
import sys
from pathlib import Path
import jax.numpy as jnp
from convert.hf import load_hf, read_config

def peak():
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").open() if l.startswith("VmHWM"))

directory = Path(sys.argv[1])
load_hf(directory.parent / "small", dtype=sys.argv[2])  # imports and compiles
before = peak()
model = load_hf(directory, dtype=sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_host_memory_stays_near_the_checkpoint(tmp_path, dtype):
    """Though two tensors are a fifth of it each, as in small models with many tokens."""
    h, m, layers = 1024, 2816, {"float32": 2, "bfloat16": 5}[dtype]
    shape = dict(
        vocab_size=8192,
        hidden_size=h,
        intermediate_size=m,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=layers,
    )
    weights = {"model.embed_tokens.weight": (8192, h), "model.norm.weight": (h,), "lm_head.weight": (8192, h)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        weights |= {f"{layer}self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
        weights |= {f"{layer}mlp.{x}_proj.weight": (m, h) for x in ("gate", "up")}
        weights |= {f"{layer}mlp.down_proj.weight": (h, m), f"{layer}input_layernorm.weight": (h,)}
        weights |= {f"{layer}post_attention_layernorm.weight": (h,)}
    checkpoints.write(tmp_path / "small", tokens=None)
    directory = checkpoints.write(
        tmp_path / "large",
        shape,
        {name: np.full(size, 0.5, jnp.dtype(dtype)) for name, size in weights.items()},
        tokens=None,
    )
    size = (directory / "model.safetensors").stat().st_size
    assert size > 140e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(directory), dtype], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.3 * size


def test_every_error_is_reported_together(tmp_path):
    weights = checkpoints.tensors()
    del weights["model.norm.weight"]
    weights["surprise"] = np.zeros(3, np.float32)
    weights[checkpoints.GATE] = np.zeros((3, 16), np.float32)
    weights["lm_head.weight"] = np.zeros((32, 16), np.int32)
    with pytest.raises(CheckpointError) as caught:
        load_hf(checkpoints.write(tmp_path / "m", weights=weights), dtype="float32")
    for part in (
        "model.norm.weight is missing",
        "surprise is not a tensor of this model",
        f"{checkpoints.GATE} has shape [3, 16], config.json asks for [24, 16]",
        "lm_head.weight has type I32, not a float",
    ):
        assert part in str(caught.value)


def test_many_errors_are_cut_short(tmp_path):
    with pytest.raises(CheckpointError, match=r"and 5 more$"):
        load_hf(
            checkpoints.write(tmp_path / "m", weights={"x.inv_freq": np.zeros(1, np.float32)}, tokens=None),
            dtype="float32",
        )


def test_a_tensor_in_two_files_is_refused(tmp_path):
    directory = checkpoints.write(tmp_path / "m")
    save_file({"lm_head.weight": np.zeros((32, 16), np.float32)}, directory / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight is in model.safetensors and in other"):
        load_hf(directory, dtype="float32")
