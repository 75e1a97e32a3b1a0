"""Files that were written anew at the same path are others."""

import pytest

from convert.orbax import Manifest
from kivi_jax.eval import contents
from tests.models import config


def test_data_is_known_by_what_its_files_hold(tmp_path):
    file = tmp_path / "a" / "task.jsonl"
    file.parent.mkdir()
    file.write_text("1")
    one, folder = contents.of_data(file), contents.of_data(str(tmp_path))
    for name in ("picture.png", "a/out/full.jsonl", "a/out/cut.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"settings": {}}\n' if "full" in name else '{"settin')
    assert contents.of_data(tmp_path) == folder  # results are no data, whichever evaluation's they are
    file.write_text("2")
    assert contents.of_data(file) != one
    assert contents.of_data(tmp_path) != folder
    assert contents.of_data("openai/gsm8k:main") is None
    assert contents.together(data=None, model="x") == {"contents": {"model": "x"}}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "additional_chat_templates/tool.jinja"]
)
@pytest.mark.parametrize("brief", [0, 2**26])
def test_a_model_is_known_by_its_files(tmp_path, monkeypatch, name, brief):
    """Large ones by size and time."""
    monkeypatch.setattr(contents, "_BRIEF", brief)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("1")
    before = contents.of_model(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert contents.of_model(tmp_path) == before
    (tmp_path / name).write_text("23")
    assert contents.of_model(tmp_path) != before


def test_a_gguf_file_is_known_by_itself(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("1")
    before = contents.of_model(file)
    (tmp_path / "tokenizer.json").write_text("x")
    assert contents.of_model(file) == before
    file.write_text("2")
    assert contents.of_model(file) != before


def test_a_converted_model_is_known_by_its_checksums(tmp_path, monkeypatch):
    """Its weights are not looked at, unless it has none."""

    sums = {"weights": "1"}
    manifest = Manifest(config(), "float32", {"weights": 1}, sums)
    monkeypatch.setattr("convert.orbax.read_manifest", lambda _: manifest)
    (tmp_path / "parameters").mkdir()
    (tmp_path / "kivi_jax.json").write_text("{}")
    before = contents.of_model(tmp_path)
    (tmp_path / "parameters" / "weights").write_text("1")
    assert contents.of_model(tmp_path) == before
    sums.clear()
    assert contents.of_model(tmp_path) != before
