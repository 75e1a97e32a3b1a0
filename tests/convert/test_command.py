"""`python -m convert`: good conversions, and one clear line for every bad one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from convert.command import convert
from convert.hf import load_hf
from convert.orbax import is_converted, load, read_manifest
from kivi_jax.console import run
from tests.convert.checkpoints import LLAMA, family_tensors, random_tensors, write_checkpoint, write_tokenizer
from tests.convert.gguf_files import WIDE, write_gguf

ROOT = Path(__file__).parents[2]
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: exit code, and what it wrote to stderr."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(convert)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(app)
        return caught.value.code, capsys.readouterr().err

    return call


def only_line(code, error):
    """The message, after checking that it is all that a failing command leaves to read."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert "Traceback" not in error
    assert len(lines) == 1
    assert error.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("error: ")


def fails(command, source, destination, *options):
    """The line a bad conversion leaves; nothing else is left beside the destination."""
    before = sorted(destination.parent.rglob("*"))
    line = only_line(*command(source, destination, *options))
    assert sorted(destination.parent.rglob("*")) == before
    return line


def edit(directory, **changes):
    """Change config.json; None removes an attribute."""
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def reweigh(directory, **changes):
    """Change tensors; None removes one."""
    weights = random_tensors(LLAMA) | changes
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, directory / "model.safetensors")


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def index(directory, content):
    """Leave an index alone: a whole file beside it would be read instead."""
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def rope(directory, **fields):
    edit(directory, rope_parameters=fields)


BROKEN = {
    "missing tensor": (lambda d: reweigh(d, **{GATE: None}), f"{GATE} is missing"),
    "extra tensor": (
        lambda d: reweigh(d, extra=np.zeros(2, np.float32)),
        "extra is not a tensor of this model",
    ),
    "wrong shape": (
        lambda d: reweigh(d, **{GATE: np.zeros((5, 32), np.float32)}),
        f"{GATE} has shape [5, 32], config.json asks for [48, 32]",
    ),
    "not floats": (lambda d: reweigh(d, **{GATE: np.zeros((48, 32), np.int8)}), f"{GATE} has type I8"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "copy or download it again"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no *.safetensors weights"),
    "pickled": (only_pickled, "pickled weights (pytorch_model.bin)"),
    "missing shard": (
        lambda d: index(d, {"weight_map": {GATE: "model-2.safetensors"}}),
        "lacks shards that its index names: model-2.safetensors",
    ),
    "index is no index": (lambda d: index(d, {"weight_map": [1]}), "model.safetensors.index.json"),
    "missing config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "invalid JSON": (lambda d: (d / "config.json").write_text("{'"), "config.json is not valid JSON"),
    "JSON list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "wrong model type": (lambda d: edit(d, model_type="gpt2"), "model_type='gpt2' is not supported"),
    "no model type": (lambda d: edit(d, model_type=None), "model_type=None is not supported"),
    "unknown rope": (
        lambda d: rope(d, rope_type="spiral", factor=2.0),
        "rope_type='spiral' is not supported: choose one of default, linear",
    ),
    "rope by layer": (
        lambda d: rope(d, full_attention={"rope_type": "default"}),
        "rope parameters by kind of layer are not supported: full_attention",
    ),
    "partial rope": (
        lambda d: rope(d, rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
        "partial_rotary_factor=0.5 is not supported",
    ),
    "rope is no object": (lambda d: edit(d, rope_scaling="linear"), "rope"),
    "chunked attention": (lambda d: edit(d, attention_chunk_size=8), "attention_chunk_size=8"),
    "a million layers": (lambda d: edit(d, num_hidden_layers=10**6), "num_layers=1000000 must be at most"),
    "no number": (
        lambda d: reweigh(d, **{GATE: np.full((48, 32), np.nan, np.float32)}),
        f"{GATE} has values that are infinite or no numbers",
    ),
    "quantized": (
        lambda d: edit(d, quantization_config={"quant_method": "bitsandbytes"}),
        "weights quantized by 'bitsandbytes' are not supported",
    ),
    "activation": (lambda d: edit(d, hidden_act="gelu"), "hidden_act='gelu'"),
    "size is text": (lambda d: edit(d, hidden_size="wide"), "hidden_size"),
    "no heads": (lambda d: edit(d, num_attention_heads=0), "config.json does not describe a llama model"),
    "vocab mismatch": (
        lambda d: write_tokenizer(d, 100),
        "the tokenizer has ids up to 99, but config.json says vocab_size=61",
    ),
    "damaged tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_checkpoint_gives_one_line_and_leaves_nothing(command, tmp_path, name):
    damage, expected = BROKEN[name]
    damage(source := write_checkpoint(tmp_path / "source", tokens=61))
    assert expected in fails(command, source, tmp_path / "destination")


def test_several_errors_are_in_one_line(command, tmp_path):
    source = write_checkpoint(tmp_path / "source", tokens=61)
    reweigh(source, **{GATE: None, "lm_head.weight": np.zeros((3, 3), np.float32), "odd": np.zeros(1)})
    line = fails(command, source, tmp_path / "destination")
    assert f"{GATE} is missing" in line
    assert "lm_head.weight has shape" in line
    assert "odd is not a tensor" in line


def test_a_source_that_is_not_there(command, tmp_path):
    assert "does not exist" in fails(command, tmp_path / "nowhere", tmp_path / "destination")


def test_a_source_that_is_a_file(command, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file: pass the checkpoint's directory" in fails(command, tmp_path / "file", tmp_path / "to")


def test_names_that_look_like_markup_are_shown(command, tmp_path):
    line = fails(command, tmp_path / "model[bold]" / "x[/y]", tmp_path / "destination")
    assert "model[bold]/x[/y] does not exist" in line


def test_a_destination_in_use(command, tmp_path):
    source, destination = write_checkpoint(tmp_path / "source", tokens=61), tmp_path / "destination"
    destination.mkdir()
    (destination / "precious").touch()
    assert "is not empty: choose another directory" in fails(command, source, destination)
    assert "did not write" in fails(command, source, destination, "--overwrite")
    (destination / "precious").unlink()
    assert command(source, destination)[0] == 0
    manifest = json.loads((destination / "kivi_jax.json").read_text())
    (destination / "kivi_jax.json").write_text(json.dumps(manifest | {"config": {}}))
    assert command(source, destination, "--overwrite")[0] == 0
    (destination / "precious").touch()
    assert "did not write (precious)" in fails(command, source, destination, "--overwrite")
    (destination / "precious").unlink()
    assert read_manifest(destination).config.vocab_size == 61
    for other in (source, tmp_path):
        assert "cannot be replaced, as" in fails(command, source, other, "--overwrite")


@pytest.mark.parametrize("under", ["", "below"])
def test_a_destination_that_is_a_file_or_below_one(command, tmp_path, under):
    source = write_checkpoint(tmp_path / "source", tokens=61)
    (tmp_path / "file").touch()
    assert "file" in fails(command, source, tmp_path / "file" / under)


def test_what_is_converted_is_not_converted_again(command, tmp_path):
    source, destination = write_checkpoint(tmp_path / "source", tokens=61), tmp_path / "destination"
    assert command(source, destination)[0] == 0
    assert "is converted already" in fails(command, destination, tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_conversion(command, tmp_path, dtype):
    source, destination = (
        write_checkpoint(tmp_path / "source", tokens=61),
        tmp_path / "some where" / "destination",
    )
    code, error = command(source, destination, "--dtype", dtype)
    assert code == 0
    assert error.replace("\n", "").endswith(f"wrote {destination}")
    model = load(destination)
    expected = load_hf(source, dtype=dtype)
    for name in ("embed.embedding", "layers.0.mlp.gate.kernel"):
        got, wanted = model, expected
        for part in name.split("."):
            got, wanted = (x[int(part)] if part.isdigit() else getattr(x, part) for x in (got, wanted))
        np.testing.assert_array_equal(np.asarray(got[...]), np.asarray(wanted[...]))
    assert (destination / "tokenizer.json").exists()
    assert [path.name for path in destination.parent.iterdir()] == ["destination"]


@pytest.mark.filterwarnings("default")  # transformers' own
def test_verify_says_what_it_compared_with(command, tmp_path):
    source = write_checkpoint(tmp_path / "source", tokens=61)
    code, error = command(source, tmp_path / "destination", "--dtype", "float32", "--verify")
    assert code == 0
    found = re.search(r"logits against (.+?): relative difference (\S+),", " ".join(error.split()))
    try:
        import torch  # noqa: F401
    except ImportError:
        assert found[1] == "kivi_jax in float32"
    else:
        assert found[1] == "transformers in float32"
    assert float(found[2]) < 1e-4


def test_verify_refuses_what_computes_something_else(command, tmp_path, monkeypatch):
    other = load_hf(
        write_checkpoint(tmp_path / "other", LLAMA | dict(rms_norm_eps=10.0), tokens=61), dtype="float32"
    )
    monkeypatch.setattr("convert.verify.load", lambda _, dtype: other)
    source = write_checkpoint(tmp_path / "source", tokens=61)
    monkeypatch.setattr("convert.verify._source_logits", no_torch)
    line = fails(command, source, tmp_path / "destination", "--verify")
    assert line == "the converted model does not compute what its source does"


def no_torch(source, tokens):
    import jax.numpy as jnp

    return "kivi_jax in float32", np.asarray(load_hf(source, dtype="float32")(jnp.asarray(tokens)))


def test_failure_while_writing_leaves_nothing(command, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no space left")

    monkeypatch.setattr("convert.orbax.write", fail)
    source = write_checkpoint(tmp_path / "source", tokens=61)
    assert fails(command, source, tmp_path / "destination") == (
        f"{tmp_path / 'destination'} cannot be written: no space left"
    )


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_real_command_line(tmp_path):
    def call(*arguments):
        return python("-m", "convert", *map(str, arguments))

    source = write_checkpoint(tmp_path / "source", tokens=61)
    good = call(source, tmp_path / "good")
    assert good.returncode == 0, good.stderr
    assert is_converted(tmp_path / "good")
    truncate(source)
    bad = call(source, tmp_path / "bad")
    assert "cannot be read" in only_line(bad.returncode, bad.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "source"]


PEAK = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
import convert, convert.command, orbax.checkpoint, rich.progress
from kivi_jax.options import Dtype
from transformers import LlamaConfig, MistralConfig

def status(field):  # of this process, in bytes; ru_maxrss would include the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

def run(source, out):
    if out is None:
        return convert.load_model(source, dtype="float32")
    dtype = Dtype.bfloat16
    convert.command.convert(source, Path(out), dtype=dtype, verify=False, overwrite=False)

tiny, big, out = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
run(tiny, out and out + "-tiny")  # what is loaded and compiled once is not the checkpoint's
before = status("VmRSS")
model = run(big, out)
print(status("VmHWM") - before)
"""


def vocabulary():
    """All of up to three letters of 36, and what merges them: 47,991 tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pairs = [(a, b) for a in letters for b in letters]
    merges = [*pairs, *((a + b, c) for a, b in pairs for c in letters)]
    return ["<unk>", "<s>", "</s>", *letters, *map("".join, merges)], list(map(" ".join, merges))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["load", "convert", "fused", "GGUF"])
def test_peak_memory_stays_below_1_3_times_the_checkpoint(tmp_path, what):
    """200 MB in float32, loaded in float32; converted with the defaults. Of a GGUF file the result counts."""
    sizes = dict(vocab_size=4000, hidden_size=768, intermediate_size=2048, num_hidden_layers=7)
    heads = dict(num_attention_heads=12, num_key_value_heads=6, head_dim=64)
    family = LLAMA | {"model_type": "phi3" if what == "fused" else "llama"}
    if what == "GGUF":
        words, merges = vocabulary()
        config = {**family, **sizes, **heads, "vocab_size": len(words), "tie_word_embeddings": True}
        tensors = family_tensors(config)
        big = write_gguf(tmp_path / "big.gguf", config, tensors, kind="Q8_0", words=words, merges=merges)
        tiny = write_gguf(tmp_path / "tiny.gguf", WIDE, kind="Q8_0")
        result = sum(tensor.nbytes for tensor in tensors.values()) // 2
    else:
        config = {**family, **sizes, **heads}
        tensors = family_tensors(config)
        big = write_checkpoint(tmp_path / "big", config, tensors, shards=2)
        tiny = write_checkpoint(tmp_path / "tiny", family, family_tensors(family))
        result = sum(tensor.nbytes for tensor in tensors.values())
    assert result > 160e6
    out = [str(tmp_path / "out")] if what in ("convert", "GGUF") else []
    done = python("-c", PEAK, str(tiny), str(big), *out)
    assert done.returncode == 0, done.stderr
    assert 0.4 * result < int(done.stdout) < 1.3 * result
