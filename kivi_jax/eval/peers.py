"""Caches of others on the same windows: transformers' `QuantizedCache`, where torch is installed.

A window's first 128 tokens are its prompt; the others are decoded one by one with the true token given, as
`frontier.py` does with ours. Perplexity and distances are against torch's own full cache.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from kivi_jax.eval.frontier import FIELDS, Text
from kivi_jax.eval.jobs import Record, finish, in_batches

PROMPT = 128  # tokens: ours hold as many in full precision
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values")  # of a layer

NewCache = Callable[[], Any]


def open_peers(model: str, dtype: str, names: Sequence[str]) -> tuple[Any, dict[str, NewCache]]:
    """transformers' model, on the GPU if there is one, and what makes each named cache for it.

    A name is a backend of `QuantizedCache` and its fields: quanto:nbits=2:q_group_size=32.

    Raises:
        ValueError: a name cannot be read; torch or the backend is not installed; or transformers does not
            read the checkpoint, or refuses a field.
    """
    from convert.hub import resolve

    read = {name: _read(name) for name in names}
    path = resolve(model)
    source = dict(gguf_file=path.name) if path.is_file() else {}
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM, QuantizedCache

        theirs = AutoModelForCausalLM.from_pretrained(
            str(path.parent if source else path), dtype=getattr(torch, dtype), local_files_only=True, **source
        )
        found = {
            name: functools.partial(QuantizedCache, backend, config=theirs.config, **fields)
            for name, (backend, fields) in read.items()
        }
        for new in found.values():  # a mistake in the last one should not cost the time of the first
            new()
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot decode with {', '.join(names)}: {reason}") from error
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return theirs.eval().requires_grad_(False).to(device), found


def _read(name: str) -> tuple[str, dict[str, int]]:
    backend, *fields = name.split(":")
    if bad := next((field for field in fields if not re.fullmatch(r"\w+=-?\d{1,9}", field)), None):
        raise ValueError(f"cannot read {bad!r} in peer {name!r}: write field=whole number")
    return backend, {key: int(value) for key, value in (field.split("=") for field in fields)}


def measure(
    theirs: Any,
    texts: Sequence[Text],
    *,
    new_cache: NewCache,
    path: Path,
    settings: Record,
    batch_size: int,
    progress: Progress,
) -> list[Record]:
    """See `frontier.measure`.

    Raises:
        ValueError: see `jobs.finish`.
    """
    items = [(text.name, window) for text in texts for window in text.windows]

    def compute(batch: Sequence[tuple[str, Any]]) -> list[Record]:
        tokens = np.array([context[-1:] + tokens for _, (_, context, tokens) in batch])
        nll, divergence, same, held = _compare(theirs, tokens, new_cache())
        return [
            {
                "text": name,
                "nll": [round(float(value), 5) for value in nll[i]],
                "divergence": float(divergence[i].mean()),
                "agreement": float(same[i].mean()),
                "bytes": held // len(batch),
            }
            for i, (name, _) in enumerate(batch)
        ]

    return finish(
        path,
        settings,
        in_batches(items, batch_size),
        compute,
        identify=lambda item: f"{item[0]}-{item[1][0]}",
        progress=progress,
        fields=FIELDS,
    )


def _compare(theirs: Any, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of every next token [B, T - 1]: its negative log-probability, KL(full || cache), whether both agree.

    And the most bytes that the cache holds over the last `PROMPT` tokens at most.
    """
    from transformers import DynamicCache

    full, scored, held = DynamicCache(), [], 0
    ids = next(theirs.parameters()).new_tensor(tokens).long()
    argument = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "past_key_values"

    def log_probs(given: Any, held: Any) -> Any:
        return theirs(given, **{argument: held}, use_cache=True).logits.float().log_softmax(-1)

    for begin in range(0, ids.shape[1] - 1, PROMPT):
        given, following = ids[:, begin : begin + PROMPT], ids[:, begin + 1 : begin + PROMPT + 1]
        reference = log_probs(given, full)
        ours, held = log_probs(given, cache) if begin == 0 else None, 0
        for i in range(following.shape[1]):
            got = log_probs(given[:, i : i + 1], cache)[:, 0] if ours is None else ours[:, i]
            expected = reference[:, i]
            nll = -got.gather(1, following[:, i : i + 1])[:, 0]
            divergence = (expected.exp() * (expected - got)).sum(-1)
            scored.append((nll, divergence, expected.argmax(-1) == got.argmax(-1)))
            held = max(held, cache_bytes(cache))
    nll, divergence, same = (
        np.stack([x.cpu().numpy() for x in column], 1) for column in zip(*scored, strict=True)
    )
    return nll, divergence, same, held


def cache_bytes(cache: Any) -> int:
    """Of all that all layers of a transformers cache hold."""
    return sum(_bytes(vars(layer).get(name)) for layer in cache.layers for name in _HELD)


def _bytes(part: Any) -> int:
    """Of a tensor, of one that wraps others (quanto's), or of a tensor and its metadata (hqq's)."""
    if isinstance(part, tuple | dict):
        return sum(map(_bytes, part.values() if isinstance(part, dict) else part))
    if inner := getattr(part, "__tensor_flatten__", None):
        return sum(_bytes(getattr(part, name)) for name in inner()[0])
    return getattr(part, "nbytes", 0)
