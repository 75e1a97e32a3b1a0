"""Converted models on disk: orbax parameters, our config, the source's config and tokenizer beside.

DST/kivi_jax.json     format version, dtype, ModelConfig, sizes and SHA-256 of the files in parameters/, and a
                      checksum of all this
DST/parameters/       orbax checkpoint, one array per parameter, named by its path
DST/config.json, generation_config.json, tokenizer and template files: as they were in the source

The manifest names these others, too, as `beside`: only what it names is replaced with it.
"""

import dataclasses
import json
import shutil
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.errors import CheckpointError, brief
from convert.files import checksums, file_sizes, find_damage, replacing, writing
from convert.gguf.load import is_gguf, write_beside
from convert.hf import abstract_parameters, build, check_tokenizer
from kivi_jax.checks import floating
from kivi_jax.config import ModelConfig, config_from_dict
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import as_laid_out, as_stored, split
from kivi_jax.outputs import seal
from pallas_kernels.pytree import tree_bytes

FORMAT = 2  # in format 1, queries, keys and values were projections of their own
MANIFEST = "kivi_jax.json"
BESIDE = ("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
TEMPLATES = "additional_chat_templates"  # a folder: transformers keeps named templates there


def is_converted(directory: FilePath) -> bool:
    """Whether `save` made this directory."""
    return (directory / MANIFEST).is_file()


def save(
    model: Llama, destination: FilePath, *, source: FilePath | None = None, overwrite: bool = False
) -> None:
    """Write a model, with the config and tokenizer files of `source`, a directory or GGUF file, beside it.

    Everything goes to a temporary sibling that is renamed at the end: `destination` is complete or absent.

    Raises:
        CheckpointError: `destination` cannot be written or replaced, see `convert.files.replacing`.
    """
    sources = () if source is None else (source,)
    needed = tree_bytes(nnx.state(model))
    with (
        replacing(
            destination, manifest=MANIFEST, overwrite=overwrite, sources=sources, needed=needed
        ) as partial,
        writing(destination),
    ):
        if source is not None:
            copy_beside(source, partial)
        write(model, partial)


def write(model: Llama, folder: FilePath) -> None:
    """`save` beside what is in a folder, which whoever made it removes if this fails."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    parameters = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    # Orbax copies what it writes: one tensor at a time here, or it would hold a second model.
    limit = 1 + max(leaf.nbytes for leaf in parameters.values())
    # Nor does it compress: that takes the largest tensor's size twice more.
    handler = ocp.BasePyTreeCheckpointHandler(
        save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit, use_compression=False
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=handler)) as checkpointer:
        checkpointer.save(folder.absolute() / "parameters", args=ocp.args.PyTreeSave(parameters))
    beside = [name for name in file_sizes(folder) if not name.startswith("parameters/")]
    manifest = {
        "format": FORMAT,
        "dtype": jnp.dtype(leaves[0][1].dtype).name,
        "config": dataclasses.asdict(model.config),
        "files": file_sizes(folder / "parameters"),
        "checksums": checksums(folder / "parameters"),
        "beside": beside,  # what may be replaced with it
    }
    manifest["manifest"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load(directory: FilePath, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Llama:
    """The model that `save` wrote, cast to `dtype` (by default as it was saved); on a `mesh`, if given.

    Raises:
        CheckpointError: the directory is damaged, or of another format.
        ValueError: the model does not divide over the mesh.
    """
    config, saved_dtype, files, sums = read_manifest(directory)
    check_tokenizer(directory, config)
    if damage := find_damage(directory / "parameters", files, sums):
        raise CheckpointError(f"{directory}/parameters is damaged ({damage}): copy it or convert again")
    wanted = abstract_parameters(config, saved_dtype if dtype is None else dtype)
    mesh = None if mesh is None else split(mesh, config)
    if mesh is not None:
        wanted = {path: as_stored(path, leaf, config, mesh) for path, leaf in wanted.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                directory.absolute() / "parameters", {"/".join(path): leaf for path, leaf in wanted.items()}
            )
    except Exception as error:  # orbax and tensorstore raise plain Exception, too
        raise CheckpointError(
            f"{directory}/parameters cannot be restored ({brief(error)}): convert again"
        ) from error
    parameters = {path: restored.pop("/".join(path)) for path in wanted}
    if mesh is not None:
        parameters = {path: as_laid_out(path, parameters[path], config, mesh) for path in wanted}
    return build(config, parameters, dtype or saved_dtype, mesh)


class Manifest(NamedTuple):
    """What `kivi_jax.json` says of a converted model."""

    config: ModelConfig
    dtype: str
    files: dict[str, int]  # bytes of each file of the parameters
    checksums: dict[str, str]  # SHA-256 of each; of models converted before these were taken, none


def read_manifest(directory: FilePath) -> Manifest:
    """What a converted model says about itself.

    Raises:
        CheckpointError: the manifest is damaged, or of another format.
    """
    file = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            cure = "upgrade kivi-jax" if manifest["format"] > FORMAT else "convert again"
            raise CheckpointError(
                f"{file} has format {manifest['format']}, this version reads {FORMAT}: {cure}"
            )
        if manifest.pop("manifest", None) not in (None, seal(manifest)):  # none: of a former version
            raise CheckpointError(f"{file} was edited: its checksum is another one; convert again")
        config, dtype = config_from_dict(manifest["config"]), floating(manifest["dtype"]).name
        return Manifest(config, dtype, dict(manifest["files"]), dict(manifest.get("checksums", {})))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): convert again") from error


def copy_beside(source: FilePath, destination: FilePath) -> None:
    """Write the config and tokenizer files of a checkpoint, a directory or GGUF file, to a folder.

    Raises:
        CheckpointError: a GGUF file's tokenizer cannot be built.
    """
    if is_gguf(source):
        return write_beside(source, destination)
    for file in {file for pattern in BESIDE for file in source.glob(pattern) if file.is_file()}:
        shutil.copy2(file, destination / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, destination / TEMPLATES)
