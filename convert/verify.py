"""Does a converted model compute what its source computes? Logits on a few fixed prompts."""

from pathlib import Path as FilePath
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from convert.errors import CheckpointError
from convert.gguf.load import is_gguf, load_gguf
from convert.hf import load_hf, not_finite
from convert.orbax import load, read_manifest

PROMPTS, TOKENS = 4, 32
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}  # by the type weights are stored in


class Verification(NamedTuple):
    """How far logits are apart. `relative` is the norm of the difference over the norm of the source's."""

    reference: str  # what the source was run with
    relative: float
    largest: float
    top_agreement: float  # share of positions whose most likely token is the same
    tolerance: float  # on `relative`: what rounding the weights to their type can explain

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; a logit that is not a number is not."""
        return self.relative < self.tolerance


def verify(converted: FilePath, source: FilePath) -> Verification:
    """Compare a converted model with the Hugging Face checkpoint or GGUF file it came from.

    Both compute in float32, so that what is compared is the weights and not the rounding on the way. The
    source runs in transformers where torch is installed, else in our own float32 model, which checks the
    conversion's storage but not our arithmetic; `reference` says which.

    Raises:
        CheckpointError: transformers cannot load the source; or a parameter is not finite.
    """
    config, stored = read_manifest(converted)[:2]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (PROMPTS, TOKENS), np.int32)
    reference, expected = _source_logits(source, tokens)
    model = load(converted, dtype="float32")
    if wrong := not_finite(model):  # also where these prompts do not look
        raise CheckpointError(f"{converted} has values that are infinite or no numbers, first in {wrong[0]}")
    logits = np.asarray(model(jnp.asarray(tokens)))
    difference = logits - expected
    return Verification(
        reference=reference,
        relative=float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        largest=float(np.abs(difference).max()),
        top_agreement=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        tolerance=TOLERANCES[stored],
    )


def _source_logits(
    source: FilePath, tokens: Int[np.ndarray, "B T"]
) -> tuple[str, Float[np.ndarray, "B T V"]]:
    from transformers.utils import import_utils

    from_file = is_gguf(source)
    # transformers reads GGUF files with accelerate's help.
    if not import_utils.is_torch_available() or (from_file and not import_utils.is_accelerate_available()):
        load_source = load_gguf if from_file else load_hf
        return "kivi_jax in float32", np.asarray(load_source(source, dtype="float32")(jnp.asarray(tokens)))
    from transformers import AutoModelForCausalLM

    directory, file = (source.parent, {"gguf_file": source.name}) if from_file else (source, {})
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype="float32", local_files_only=True, **file
        )
    except Exception as error:  # transformers checks little, so what it meets may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"transformers cannot load {source} to compare with: {reason}") from error
    # The tensor type is reached through the model, so that this package never imports torch.
    ids = next(model.parameters()).new_tensor(tokens).long()
    return "transformers in float32", model(ids).logits.detach().numpy()
