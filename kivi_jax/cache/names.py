"""Cache strategies by name: in calls (`cache="kivi2"`), on command lines and in configuration strings.

    full                              kivi2                             kivi4:group_size=64
    scope:window=512:recent=256       kivi2r+scope:prompt=snapkv:prompt_budget=2048

kivi1, kivi2, kivi4 and kivi8 pack in so many bits; an r after it is for rotated keys, and sinks=4. kivi42r
has keys of 4 and values of 2 bits.
A name is followed by fields, separated by colons (no commas or brackets, so that a name survives shells
and comma-separated lists). Fields of KIVI are those of `kivi()`. With `scope`, `decode=` and `prompt=` name
selectors; `prompt_NAME` is a field of the prompt selector, `pool_NAME` (pool_bits=4) one of the pool's
packing, and any other name one of the decode selector.
"""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any

from kivi_jax.cache.decode_selectors import GKV, Adaptive, Discontinuous, Random, Slide, VaSE
from kivi_jax.cache.kivi import KiviQuantization
from kivi_jax.cache.prompt_selectors import (
    ExpectedAttention,
    KeepAll,
    KeyDiff,
    PyramidInfer,
    PyramidKV,
    SnapKV,
)
from kivi_jax.cache.stores import PoolQuantization
from kivi_jax.cache.strategy import CacheStrategy, full, kivi, scope
from kivi_jax.cache.unified_selectors import H2O, StreamingLLM

_KIVI: dict[str, dict[str, Any]] = {
    **{f"kivi{bits}": {"bits": bits} for bits in (1, 2, 4, 8)},
    **{f"kivi{bits}r": {"bits": bits, "rotate_keys": True, "sinks": 4} for bits in (1, 2, 4, 8)},
    "kivi42r": {"key_bits": 4, "value_bits": 2, "rotate_keys": True, "sinks": 4},
}
NAMES = ("full", *_KIVI, "scope", *(f"{name}+scope" for name in _KIVI))
DECODE = {
    "slide": Slide,
    "adaptive": Adaptive,
    "discontinuous": Discontinuous,
    "random": Random,
    "gkv": GKV,
    "vase": VaSE,
    "h2o": H2O,
    "streamingllm": StreamingLLM,
    "keepall": KeepAll,
}
PROMPT = {
    "keepall": KeepAll,
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "pyramidinfer": PyramidInfer,
    "expectedattention": ExpectedAttention,
    "keydiff": KeyDiff,
    "streamingllm": StreamingLLM,
}
WORDS = {  # fields whose values are not numbers
    "scale_dtype": ("float16", "bfloat16", "float32"),
    "pooling": ("average", "max"),
}
FRACTIONS = ("decay",)  # fields whose numbers need not be whole
_KIVI_FIELDS = set(inspect.signature(kivi).parameters) - {"bits", "rotate_keys", "prompt", "decode", "pool"}


def parse_cache(text: str) -> CacheStrategy:
    """The strategy that `text` names.

    Raises:
        ValueError: the name or a field is unknown, or a value is not allowed; the message lists what is.
    """
    if not isinstance(text, str):
        raise ValueError(f"cache={text!r} is no text: pass a name, such as kivi2")
    name, *fields = text.split(":")
    if name not in NAMES:
        raise ValueError(f"unknown cache {name!r}: choose one of {', '.join(NAMES)}")
    options = _read_fields(fields, text)
    base, _, plus = name.partition("+")
    quantized = {key: options.pop(key) for key in list(options) if base in _KIVI and key in _KIVI_FIELDS}
    selectors: dict[str, Any] = {}
    if "scope" in (base, plus):
        prompt = _take(options, "prompt_")
        selectors["prompt"] = _selector(PROMPT, options.pop("prompt", "keepall"), prompt, text)
        pool = _take(options, "pool_")
        selectors["pool"] = _selector({"pool": PoolQuantization}, "pool", pool, text) if pool else None
        selectors["decode"] = _selector(DECODE, options.pop("decode", "slide"), options, text)
        options = {}
    if options:
        known = ", ".join(sorted(_KIVI_FIELDS)) if base in _KIVI else "none"
        raise ValueError(f"cache {text!r}: {name} has no field {', '.join(options)}; its fields: {known}")
    if base in _KIVI:
        _check_values(quantized, text)
        return kivi(**{**_KIVI[base], **quantized}, **selectors)
    return scope(**selectors) if base == "scope" else full()


def strategy_of(cache: CacheStrategy | str) -> CacheStrategy:
    """The strategy itself, or the one that a name means: what takes a cache takes either.

    Raises:
        ValueError: it is neither, or see `parse_cache`.
    """
    if isinstance(cache, CacheStrategy):
        return cache
    if not isinstance(cache, str):
        raise ValueError(f"cache={cache!r} is neither a strategy nor the name of one, such as kivi2")
    return parse_cache(cache)


def cache_name(strategy: CacheStrategy) -> str:
    """The name that `parse_cache` reads as `strategy`; fields that have their defaults are left out.

    Raises:
        ValueError: there is none: a selector is not one of kivi_jax's.
    """
    name, fields = "", []
    if (packed := strategy.quantization) is not None:
        name, fields = _kivi_name(packed)
    keeps_all = KeepAll()
    if strategy.prompt != keeps_all or strategy.decode != keeps_all or strategy.pool is not None:
        name = f"{name}+scope" if name else "scope"
        fields += _selector_name(PROMPT, strategy.prompt, "prompt=keepall", "prompt_")
        fields += _selector_name(DECODE, strategy.decode, "decode=slide", "")
    if (pool := strategy.pool) is not None:
        usual = vars(PoolQuantization(bits=pool.bits))
        fields += [f"pool_bits={pool.bits}", *_changed(vars(pool), usual, "pool_")]
    return ":".join([name or "full", *fields])


def _selector_name(kinds: dict[str, Any], selector: Any, default: str, prefix: str) -> list[str]:
    kind = next((name for name, cls in kinds.items() if cls is type(selector)), None)
    if kind is None:
        raise ValueError(f"{selector} has no name: it is none of {', '.join(kinds)}")
    named = f"{default.partition('=')[0]}={kind}"
    usual = {field.name: field.default for field in dataclasses.fields(selector)}
    return [named] * (named != default) + _changed(vars(selector), usual, prefix)


def _kivi_name(packed: KiviQuantization) -> tuple[str, list[str]]:
    """The name that needs the fewest fields beside it, of equals that with the keys' bits; and the fields."""
    changed = {
        name: _changed(_kivi_fields(packed), _kivi_fields(kivi(**usual).quantization), "")
        for name, usual in _KIVI.items()
        if usual.get("rotate_keys", False) == packed.rotate_keys
    }
    return min(changed.items(), key=lambda item: (len(item[1]), f"{packed.key_bits}" not in item[0]))


def _kivi_fields(quantization: Any) -> dict[str, Any]:
    """Fields by name, with one group size where both sides have the same."""
    fields = dict(vars(quantization))
    if fields["key_group_size"] == fields["value_group_size"]:
        fields["group_size"] = fields.pop("key_group_size")
        del fields["value_group_size"]
    return fields


def _changed(fields: dict[str, Any], usual: dict[str, Any], prefix: str) -> list[str]:
    """`field=value` for what is not as usual."""
    return [f"{prefix}{name}={held}" for name, held in fields.items() if held != usual.get(name)]


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
    _check_values(options, text)
    return kinds[kind](**options)


def _check_values(options: dict[str, int | float | str], text: str) -> None:
    for key, value in options.items():
        if key in WORDS and value not in WORDS[key]:
            raise ValueError(f"cache {text!r}: {key}={value} must be one of {', '.join(WORDS[key])}")
        if key not in WORDS and isinstance(value, str):
            kind = "number" if key in FRACTIONS else "whole number"
            raise ValueError(f"cache {text!r}: {key}={value} must be a {kind}")


def _take(options: dict[str, int | float | str], prefix: str) -> dict[str, int | float | str]:
    """The options whose names begin with `prefix`, taken out and without it."""
    return {key.removeprefix(prefix): options.pop(key) for key in list(options) if key.startswith(prefix)}


def _read_fields(fields: Sequence[str], text: str) -> dict[str, int | float | str]:
    options: dict[str, int | float | str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"cannot read {field!r} in cache {text!r}: write field=value")
        if key in options:
            raise ValueError(f"cache {text!r} gives {key} twice: leave one out")
        options[key] = _number(value)
    return options


def _number(value: str) -> int | float | str:
    if re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    return float(value) if re.fullmatch(r"-?[0-9]*\.[0-9]{1,18}", value) else value
