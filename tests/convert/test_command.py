"""`python -m convert`: what it writes, and how it fails."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert.__main__ import app
from convert.orbax import read_manifest
from kivi_jax.console import run
from tests.convert.checkpoints import LLAMA, random_tensors, write_checkpoint, write_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command with arguments; returns its exit code and what it wrote to stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run(app)
        return stopped.value.code or 0, capsys.readouterr().err

    return call


def test_a_checkpoint_is_converted_and_verified(tmp_path, command):
    source = write_checkpoint(tmp_path / "hf", shards=2)
    write_tokenizer(source, 61)
    code, said = command(source, tmp_path / "out", "--dtype", "float32", "--verify")
    assert code == 0, said
    assert "logits against" in said
    tokens = jnp.arange(30)[None]
    converted, _ = convert.load_model(tmp_path / "out", dtype="float32")
    original, _ = convert.load_model(source, dtype="float32")
    np.testing.assert_array_equal(converted(tokens), original(tokens))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_bfloat16_is_the_default(tmp_path, command):
    source = write_checkpoint(tmp_path / "hf")
    assert command(source, tmp_path / "out")[0] == 0
    assert read_manifest(tmp_path / "out")[1] == "bfloat16"


def test_overwrite_replaces_and_nothing_else_does(tmp_path, command):
    source = write_checkpoint(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    code, said = command(source, tmp_path / "out")
    assert (code, "is not empty" in said) == (2, True)
    assert (tmp_path / "out" / "precious").exists()
    assert command(source, tmp_path / "out", "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "precious").exists()


def test_what_is_converted_already_is_refused(tmp_path, command):
    assert command(write_checkpoint(tmp_path / "hf"), tmp_path / "out")[0] == 0
    code, said = command(tmp_path / "out", tmp_path / "again")
    assert (code, "is converted already" in said) == (2, True)


def test_a_failed_verification_leaves_nothing(tmp_path, command, monkeypatch):
    monkeypatch.setattr("convert.verify.TOLERANCES", {"bfloat16": 0.0})
    code, said = command(write_checkpoint(tmp_path / "hf"), tmp_path / "out", "--verify")
    assert (code, "does not compute what its source does" in said) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def malformed(directory: Path, how: str) -> Path:
    tensors = random_tensors(LLAMA)
    if how == "missing tensor":
        del tensors["model.norm.weight"]
    elif how == "extra tensor":
        tensors["model.norm.bias"] = np.zeros(32, np.float32)
    elif how == "wrong shape":
        tensors["lm_head.weight"] = np.zeros((60, 32), np.float32)
    rope = {"rope_type": "[/spiral]"} if how == "unknown rope type" else LLAMA["rope_parameters"]
    write_checkpoint(directory, {**LLAMA, "rope_parameters": rope}, tensors)
    if how == "truncated safetensors":
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing config":
        (directory / "config.json").unlink()
    elif how == "vocab mismatch":
        write_tokenizer(directory, 100)
    elif how == "pickled weights":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return directory


MALFORMED = {
    "missing tensor": "model.norm.weight is missing",
    "extra tensor": "model.norm.bias is not a tensor of this model",
    "wrong shape": "lm_head.weight has shape [60, 32], config.json asks for [61, 32]",
    "truncated safetensors": "model.safetensors cannot be read",
    "missing config": "config.json is missing",
    "unknown rope type": "rope_type='[/spiral]' is not supported",
    "vocab mismatch": "ids up to 99, but config.json says vocab_size=61",
    "pickled weights": "save it as safetensors first",
}


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_checkpoint_is_one_line_and_leaves_nothing(tmp_path, command, how):
    code, said = command(malformed(tmp_path / "hf", how), tmp_path / "out")
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert MALFORMED[how] in line
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_the_module_runs_and_a_missing_source_is_one_line(tmp_path):
    done = python("-m", "convert", str(tmp_path / "missing"), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"error: {tmp_path}/missing does not exist: pass a directory or a hub name (org/name)\n"
    )
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
import convert, convert.command, orbax.checkpoint, rich.progress
from transformers import LlamaConfig, MistralConfig

def status(field):  # of this process, in bytes; ru_maxrss would include the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

def run(source, out):
    if out is None:
        return convert.load_model(source, dtype="float32")
    dtype = convert.command.Dtype.bfloat16
    convert.command.convert(source, Path(out), dtype=dtype, verify=False, overwrite=False)

tiny, big, out = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
run(tiny, out and out + "-tiny")  # what is loaded and compiled once is not the checkpoint's
before = status("VmRSS")
model = run(big, out)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("what", ["load", "convert"])
def test_peak_memory_stays_below_1_3_times_the_checkpoint(tmp_path, what):
    """200 MB in float32, loaded in float32; converted with the defaults."""
    sizes = dict(vocab_size=4000, hidden_size=768, intermediate_size=2048, num_hidden_layers=7)
    heads = dict(num_attention_heads=12, num_key_value_heads=6, head_dim=64)
    big = write_checkpoint(tmp_path / "big", {**LLAMA, **sizes, **heads}, shards=2)
    tiny = write_checkpoint(tmp_path / "tiny")
    size = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    assert size > 200e6
    out = [str(tmp_path / "out")] if what == "convert" else []
    done = python("-c", PEAK, str(tiny), str(big), *out)
    assert done.returncode == 0, done.stderr
    assert 0.4 * size < int(done.stdout) < 1.3 * size
