"""`quantized_attention`: validate, choose an implementation, call it. Read `xla.py` next.

Implementations are tried in order of preference. One that cannot do a case raises `NotImplementedError`
with the reason; the next is tried, and the fallback is logged once. XLA can do every case.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.partials import AttentionPartial
from pallas_kernels.quantization import QuantizedTensor

Implementation = Literal["xla"]
Attend = Callable[..., AttentionPartial]

_MODULES: dict[str, str] = {"xla": "pallas_kernels.quantized_attention.xla"}
_PREFERENCE: dict[str, tuple[Implementation, ...]] = {}  # platform -> order, before XLA

_log = logging.getLogger(__name__)


def quantized_attention(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> AttentionPartial:
    """Attention of one query per row and head over the packed tokens `start <= t < end` of its row.

    `key` and `value` denote [B, K, S, H], keys grouped over tokens and values over channels. Token t is
    in slot t % S: the store is a ring, of which the newest S tokens before `end` are present. The
    dequantized cache is never materialized. Head n reads KV head n // (N // K); scores are
    `scale * query . key`, by default with `scale = H ** -0.5`. An empty range gives the empty partial.

    Raises:
        ValueError: shapes or groupings do not fit together.
        NotImplementedError: the `implementation` asked for cannot do this case, and why.
    """
    _check(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    order = (implementation,) if implementation else (*_PREFERENCE.get(jax.default_backend(), ()), "xla")
    for name in order[:-1]:
        try:
            return _load(name)(query, key, value, start=start, end=end, scale=scale)
        except NotImplementedError as reason:
            _log_fallback(name, str(reason))
    return _load(order[-1])(query, key, value, start=start, end=end, scale=scale)


def _check(query: Array, key: QuantizedTensor, value: QuantizedTensor) -> None:
    if key.group_axis != "token" or value.group_axis != "channel":
        raise ValueError(
            "keys must be grouped over tokens and values over channels, got "
            f"{key.group_axis=}, {value.group_axis=}"
        )
    batch, heads, dim = query.shape
    if key.shape != value.shape or len(key.shape) != 4:
        raise ValueError(f"keys {key.shape} and values {value.shape} must both be [B, K, S, H]")
    if (key.shape[0], key.shape[3]) != (batch, dim) or heads % key.shape[1]:
        raise ValueError(f"query {query.shape} [B, N, H] does not fit a cache {key.shape} [B, K, S, H]")


def _load(name: str) -> Attend:
    return importlib.import_module(_MODULES[name]).attend


@functools.lru_cache(maxsize=256)
def _log_fallback(name: str, reason: str) -> None:
    _log.warning("quantized_attention: %s is not used: %s", name, reason)
