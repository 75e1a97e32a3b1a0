"""Does a converted model compute what its source computes? Logits on a few fixed prompts."""

from pathlib import Path as FilePath
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from convert.hf import load_hf
from kivi_jax.llama import Llama

PROMPTS, TOKENS = 4, 32


class Verification(NamedTuple):
    """How far logits are apart. `relative` is the norm of the difference over the norm of the source's."""

    reference: str  # what the source was run with
    relative: float
    largest: float
    top_agreement: float  # share of positions whose most likely token is the same

    @property
    def passed(self) -> bool:
        """Whether the difference is what rounding the weights to 16 bits can explain, or less."""
        return self.relative < 0.05


def verify(model: Llama, source: FilePath) -> Verification:
    """Compare `model` with the Hugging Face checkpoint it came from, in float32.

    The source runs in transformers where torch is installed, else in our own float32 model, which checks
    the conversion's storage but not our arithmetic; `reference` says which.
    """
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (PROMPTS, TOKENS), np.int32)
    reference, expected = _source_logits(source, tokens)
    logits = np.asarray(model(jnp.asarray(tokens)))
    difference = logits - expected
    return Verification(
        reference=reference,
        relative=float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        largest=float(np.abs(difference).max()),
        top_agreement=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
    )


def _source_logits(
    source: FilePath, tokens: Int[np.ndarray, "B T"]
) -> tuple[str, Float[np.ndarray, "B T V"]]:
    from transformers.utils import import_utils

    if not import_utils.is_torch_available():
        return "kivi_jax in float32", np.asarray(load_hf(source, dtype="float32")(jnp.asarray(tokens)))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), dtype="float32", local_files_only=True)
    # The tensor type is reached through the model, so that this package never imports torch.
    ids = next(model.parameters()).new_tensor(tokens).long()
    return "transformers in float32", model(ids).logits.detach().numpy()
