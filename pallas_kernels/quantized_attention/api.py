"""`quantized_attention`: validate, choose an implementation, call it. Read `xla.py` next.

Implementations are tried in order of preference. One that cannot do a case raises `NotImplementedError`
with the reason; the next is tried, and the fallback is logged once. XLA can do every case.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.device import default_device
from pallas_kernels.dispatch import load_kernel, log_fallback
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.residual.ring import Ring, Token

Implementation = Literal["xla", "pallas_triton", "triton", "pallas_mosaic"]
Attend = Callable[..., AttentionPartial]

# The kernels, in the order they are tried on an NVIDIA GPU, and the compute capability they need. By itself
# `triton` is up to a tenth faster on an H100; but XLA makes a CUDA graph of a whole decode step with Pallas'
# calls, and none of jax-triton's, and `pallas_triton` also attends to the residual where it merges.
_KERNELS: dict[Implementation, float] = {"pallas_triton": 8.0, "triton": 8.0, "pallas_mosaic": 9.0}

_log_fallback = functools.partial(log_fallback, "quantized_attention")


def quantized_attention(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    held_back: int = 0,
    scale: float | None = None,
    residual: Ring | None = None,
    own: Token | None = None,
    implementation: Implementation | None = None,
) -> AttentionPartial:
    """Attention of one query per row and head over packed tokens, `start <= t < end - held_back` of its row.

    With a `residual` also over its tokens `t >= start`, which should be none of the packed range; with an
    `own` token, which comes after all others, over that, too. A kernel may answer with the normalized
    partial. One that has seen a query's own token knows all that there is to attend to: then `out` may be in
    the dtype of its value.

    `key` and `value` denote [B, K, S, H], keys grouped over tokens and values over channels. Token t is
    in slot t % S: the store is a ring, of which the newest S tokens before `end` are present. The
    dequantized cache is never materialized. Head n reads KV head n // (N // K); scores are
    `scale * query . key`, by default with `scale = H ** -0.5`. An empty range weighs nothing in a `merge`.

    Raises:
        ValueError: shapes or groupings do not fit together.
        NotImplementedError: the `implementation` asked for cannot do this case, and why.
    """
    _check(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    device = default_device()
    if implementation is None:
        order: tuple[Implementation, ...] = (*_KERNELS, "xla") if device.platform == "gpu" else ("xla",)
    else:
        order = (implementation,)

    def attend(name: Implementation) -> AttentionPartial:
        call = _load(name, device)
        options = {"held_back": held_back, "scale": scale, "residual": residual, "own": own}
        return call(query, key, value, start=start, end=end, **options)

    for name in order[:-1]:
        try:
            return attend(name)
        except NotImplementedError as reason:
            _log_fallback(name, str(reason))
    return attend(order[-1])


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


def _load(name: Implementation, device: Any) -> Attend:
    return load_kernel(f"pallas_kernels.quantized_attention.{name}", _KERNELS.get(name, 0.0), device).attend
