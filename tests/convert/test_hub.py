"""Names that are not directories are looked up on the hub; what goes wrong is one line."""

import huggingface_hub
import pytest

import convert
from convert.errors import CheckpointError
from convert.hub import resolve
from tests.convert.checkpoints import write_checkpoint


def test_a_hub_name_is_downloaded_without_pickles(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "snapshot")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, directory = convert.load_model("some-org/some.model-1B", dtype="float32")
    assert (directory, model.config.vocab_size, asked["name"]) == (source, 61, "some-org/some.model-1B")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_gguf_file_of_a_repository_is_downloaded_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *asked: str(tmp_path.joinpath(*asked)))
    assert resolve("org/some.model-1B/Q4/model.gguf") == tmp_path / "org/some.model-1B" / "Q4/model.gguf"


@pytest.mark.parametrize("error", [OSError("no network\nat all"), RuntimeError("")])
def test_a_failed_download_is_one_line(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="org/name is neither here nor") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("no network" if str(error) else "RuntimeError")


@pytest.mark.parametrize(
    "source", ["missing", "./missing/dir", "/missing/dir", "a/b/c", "org/na me", "./a/b.gguf", "b.gguf"]
)
def test_what_cannot_be_a_hub_name_is_never_asked_for(monkeypatch, source):
    def download(*_, **__):
        pytest.fail("asked the hub")

    for function in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, download)
    with pytest.raises(CheckpointError, match="does not exist: pass a directory or a hub name"):
        resolve(source)


def test_a_file_is_not_a_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="pass the checkpoint's directory, or a GGUF file"):
        resolve(file)


def test_a_directory_with_one_gguf_file_stands_for_it(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve(file) == resolve(tmp_path) == file
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds several GGUF files: pass one of them, as model\.gguf"):
        resolve(tmp_path)
    write_checkpoint(tmp_path)
    assert resolve(tmp_path) == tmp_path
