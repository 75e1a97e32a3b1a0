"""Cache strategies by name, for command lines and configuration strings.

    full                              kivi2                             kivi4:group_size=64
    scope:window=512:recent=256       kivi2+scope:prompt=snapkv:prompt_budget=2048

A name is followed by fields, separated by colons (no commas or brackets, so that a name survives shells
and comma-separated lists). Fields of KIVI are those of `kivi()`. With `scope`, `decode=` and `prompt=` name
selectors; `prompt_NAME` is a field of the prompt selector, `pool_NAME` (pool_bits=4) one of the pool's
packing, and any other name one of the decode selector.
"""

import dataclasses
import inspect
from typing import Any

from kivi_jax import selection
from kivi_jax.cache import CacheStrategy, PoolQuantization, full, kivi, scope

KIVI_BITS = {"kivi1": 1, "kivi2": 2, "kivi4": 4, "kivi8": 8}
NAMES = ("full", *KIVI_BITS, "scope", *(f"{name}+scope" for name in KIVI_BITS))
DECODE = {
    "slide": selection.Slide,
    "adaptive": selection.Adaptive,
    "discontinuous": selection.Discontinuous,
    "h2o": selection.H2O,
    "streamingllm": selection.StreamingLLM,
    "keepall": selection.KeepAll,
}
PROMPT = {
    "keepall": selection.KeepAll,
    "h2o": selection.H2O,
    "snapkv": selection.SnapKV,
    "pyramidkv": selection.PyramidKV,
    "pyramidinfer": selection.PyramidInfer,
    "streamingllm": selection.StreamingLLM,
}
WORDS = ("scale_dtype", "pooling")  # fields whose values are not numbers
_KIVI_FIELDS = set(inspect.signature(kivi).parameters) - {"bits", "prompt", "decode", "pool"}


def parse_cache(text: str) -> CacheStrategy:
    """The strategy that `text` names.

    Raises:
        ValueError: the name or a field is unknown, or a value is not allowed; the message lists what is.
    """
    name, *fields = text.split(":")
    if name not in NAMES:
        raise ValueError(f"unknown cache {name!r}: choose one of {', '.join(NAMES)}")
    options = dict(_read_field(field, text) for field in fields)
    base, _, plus = name.partition("+")
    quantized = {key: options.pop(key) for key in list(options) if base in KIVI_BITS and key in _KIVI_FIELDS}
    selectors: dict[str, Any] = {}
    if "scope" in (base, plus):
        prompt = {key.removeprefix("prompt_"): options.pop(key) for key in list(options) if "prompt_" in key}
        selectors["prompt"] = _selector(PROMPT, options.pop("prompt", "keepall"), prompt, text)
        pool = {key.removeprefix("pool_"): options.pop(key) for key in list(options) if "pool_" in key}
        selectors["pool"] = _selector({"pool": PoolQuantization}, "pool", pool, text) if pool else None
        selectors["decode"] = _selector(DECODE, options.pop("decode", "slide"), options, text)
        options = {}
    if options:
        known = ", ".join(sorted(_KIVI_FIELDS)) if base in KIVI_BITS else "none"
        raise ValueError(f"cache {text!r}: {name} has no field {', '.join(options)}; its fields: {known}")
    if base in KIVI_BITS:
        _check_numbers(quantized, text)
        return kivi(KIVI_BITS[base], **quantized, **selectors)
    return scope(**selectors) if base == "scope" else full()


def _selector(kinds: dict[str, Any], kind: Any, options: dict[str, Any], text: str) -> Any:
    if kind not in kinds:
        raise ValueError(f"cache {text!r}: unknown selector {kind!r}: choose one of {', '.join(kinds)}")
    fields = {field.name: field for field in dataclasses.fields(kinds[kind])}
    if unknown := sorted(options.keys() - fields.keys()):
        known = ", ".join(fields) or "none"
        raise ValueError(f"cache {text!r}: {kind} has no field {', '.join(unknown)}; its fields: {known}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := sorted(set(required) - options.keys()):
        raise ValueError(f"cache {text!r}: {kind} needs {', '.join(missing)}")
    _check_numbers(options, text)
    return kinds[kind](**options)


def _check_numbers(options: dict[str, int | str], text: str) -> None:
    words = {key: value for key, value in options.items() if isinstance(value, str) and key not in WORDS}
    if words:
        wrong = ", ".join(f"{key}={value}" for key, value in words.items())
        raise ValueError(f"cache {text!r}: {wrong} must be a whole number")


def _read_field(field: str, text: str) -> tuple[str, int | str]:
    key, equals, value = field.partition("=")
    if not equals:
        raise ValueError(f"cannot read {field!r} in cache {text!r}: write field=value")
    return key, int(value) if value.lstrip("-").isdigit() else value
