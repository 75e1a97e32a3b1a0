"""`kivi-jax demo` and `kivi-jax eval`: what they print and write."""

import json
import sys

import pytest

from kivi_jax.commands.app import app
from kivi_jax.console import run
from kivi_jax.demo import command as demo_command
from tests.convert.checkpoints import LLAMA, write_checkpoint


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kivi-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(app)
        return caught.value.code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_the_demo_prints_its_tables_and_saves_its_plot(command, monkeypatch, tmp_path):
    kept = {name: demo_command.DEMO_CACHES[name] for name in ("full", "kivi2+scope")}
    monkeypatch.setattr(demo_command, "DEMO_CACHES", kept)
    code, out, _ = command("demo", "--problems", 1, "--plot", tmp_path / "demo.png")
    assert code == 0
    assert "passkey, 1,024 tokens: 1 problems" in out
    assert "30 questions: 1 problems" in out
    assert out.count("kivi2+scope") == 2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]


def test_every_demo_cache_has_a_name():
    assert list(demo_command.DEMO_CACHES) == ["full", "kivi4", "kivi2", "scope", "kivi2+scope"]


@pytest.mark.slow
def test_eval_compares_with_full(command, tmp_path):
    options = ("--pairs", 3, "--problems", 2, "--cache", "kivi8:residual_length=32")
    code, out, _ = command("eval", "recall", *options, "--out", tmp_path / "out.json")
    assert code == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["results"]) == ["recall of 3 pairs"]
    assert all(title in out for title in record["results"])
    for outcomes in record["results"].values():
        assert [outcome["cache"] for outcome in outcomes] == ["full", "kivi8:residual_length=32"]
        assert outcomes[0]["same"] == 1


def test_eval_takes_any_model(command, tmp_path):
    model = write_checkpoint(tmp_path / "model", LLAMA, tokens=61)
    sizes = ("--questions", 2, "--problems", 1, "--cache", "full")
    code, out, _ = command("eval", "longgen", "--model", model, *sizes)
    assert code == 0
    assert "2 questions: 1 problems" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("passkey", "--tokens", "20"), "tokens=20 must be at least"),
        (("recall", "--cache", "kivi3"), "unknown cache 'kivi3'"),
        (("longgen", "--questions", "100"), "question numbers must be in [1, 99]"),
        (("longgen", "--model", "nowhere"), "nowhere does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_mistake_is_one_line(command, arguments, message):
    code, out, error = command("eval", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
