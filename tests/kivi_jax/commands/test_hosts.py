"""`--distributed`: two processes of four simulated devices each are one machine of eight."""

import json
import os
import socket
import subprocess
import sys

import pytest

from kivi_jax.commands.hosts import LOST
from tests.convert.checkpoints import LLAMA, write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One whose heads divide over eight devices."""
    raw = {**LLAMA, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 64}
    return write_checkpoint(tmp_path_factory.mktemp("model") / "hf", raw, tokens=61)


def start(*arguments, second=None):
    """Both hosts, which have found each other; the second may be started with other arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "kivi_jax", *map(str, given), "--distributed"],
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, given in enumerate((arguments, second or arguments))
    ]


def test_two_hosts_give_one_process_s_tokens(command, model, tmp_path):
    """The first writes them; the second writes and prints nothing."""
    prompts = [{"prompt": text} for text in ("w3 w5 w7", "w9 w2", "w4", "w8 w8 w8")]
    questions = tmp_path / "in.jsonl"
    questions.write_text("\n".join(map(json.dumps, prompts)))
    options = ("generate", model, "--input", questions, "--cache", "kivi2", "--max-new-tokens", 6)
    assert command(*options, "--output", tmp_path / "one.jsonl")[0] == 0
    hosts = start(*options, "--output", tmp_path / "two.jsonl", "--mesh", "data=1,model=8")
    printed = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], printed
    assert printed[1][0] == ""
    assert "4 answers in" in printed[0][1]
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_hosts_that_read_different_files_do_not_begin(model, tmp_path):
    commands = []
    for number, text in enumerate(("w3 w5", "w3 w6")):
        questions = tmp_path / str(number) / "in.jsonl"
        questions.parent.mkdir()
        questions.write_text(json.dumps({"prompt": text}))
        files = ("--input", questions, "--output", tmp_path / "out.jsonl")
        commands.append(("generate", model, *files, "--max-new-tokens", 2, "--mesh", "model=8"))
    hosts = start(*commands[0], second=commands[1])
    for host in hosts:
        _, said = host.communicate(timeout=200)
        assert host.returncode == 2
        assert "files that differ by content: start the same command on all of them" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_host_that_dies_ends_the_other_with_one_line(model):
    first, second = start("generate", model, "w3", "--max-new-tokens", 100000, "--mesh", "model=8")
    assert first.stdout.read(2)  # it has begun
    second.kill()
    second.communicate()
    _, said = first.communicate(timeout=200)
    assert (first.returncode, said.splitlines()[-1]) == (2, f"error: {LOST}")


def test_an_address_where_nobody_is_ends_with_one_line():
    """JAX tries for minutes, then aborts the process."""
    code = "; ".join(
        (
            "import jax, os",
            "from kivi_jax.commands.hosts import together",
            "jax.distributed.initialize = lambda **_: os.abort()",
            "together().__enter__()",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {LOST}\n")


def test_hosts_that_nobody_named_are_asked_for(command, model):
    code, _, said = command("generate", model, "w3", "--distributed")
    assert (code, said) == (2, "error: --distributed needs --mesh, over the devices of all hosts\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    asked = [
        sys.executable,
        "-m",
        "kivi_jax",
        "generate",
        str(model),
        "w3",
        "--mesh",
        "model=8",
        "--distributed",
    ]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in done.stderr
