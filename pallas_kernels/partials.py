"""Attention over a part of the tokens, and how parts combine. Read `quantized_attention/api.py` next.

Softmax attention over a set of tokens is determined by three numbers a query keeps while it looks at
them in any order and any grouping (the online softmax). With scores s_t and values v_t:

    max = max_t s_t      denom = sum_t exp(s_t - max)      out = sum_t exp(s_t - max) v_t

`merge` is associative and commutative, with `empty` as its neutral element, so a cache may answer in
pieces: attention over all of it is `normalize(merge(piece, piece, ...))`.

Source: Milakov and Gimelshein, arXiv 1805.02867; FlashDecoding's split softmax.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.pytree import pytree

# The maximum of no scores. Finite, so that differences of maxima never give inf - inf = NaN.
NO_SCORE = -1e30


@pytree
class AttentionPartial:
    """Unnormalized attention of queries [*B] over some tokens, in float32.

    It may be normalized, which weighs the same in a `merge`: `denom` is 1, and `max` the log-sum-exp. With
    nothing left to merge with, `out` may then be in the dtype of the query's own value.
    """

    out: Float[Array, "*B H"]
    max: Float[Array, "*B"]
    denom: Float[Array, "*B"]

    @property
    def log_sum_exp(self) -> Float[Array, "*B"]:
        """log sum_t exp(s_t): a token's softmax weight is `exp(s_t - log_sum_exp)`."""
        return self.max + jnp.log(jnp.maximum(self.denom, jnp.finfo(jnp.float32).tiny))


def empty(shape: tuple[int, ...]) -> AttentionPartial:
    """The partial of queries [*B] over no tokens; `shape` is (*B, H)."""
    return AttentionPartial(
        out=jnp.zeros(shape, jnp.float32),
        max=jnp.full(shape[:-1], NO_SCORE, jnp.float32),
        denom=jnp.zeros(shape[:-1], jnp.float32),
    )


def merge(*partials: AttentionPartial) -> AttentionPartial:
    """The partial over the union of disjoint sets of tokens."""
    top = functools.reduce(jnp.maximum, [partial.max for partial in partials])
    weights = [jnp.exp(partial.max - top) for partial in partials]
    pairs = list(zip(partials, weights, strict=True))
    return AttentionPartial(
        out=sum((p.out * w[..., None] for p, w in pairs[1:]), pairs[0][0].out * pairs[0][1][..., None]),
        max=top,
        denom=sum((p.denom * w for p, w in pairs[1:]), pairs[0][0].denom * pairs[0][1]),
    )


def normalize(partial: AttentionPartial) -> Float[Array, "*B H"]:
    """The attention output: `out / denom`, and zeros for a query that saw no token."""
    denom = jnp.where(partial.denom > 0, partial.denom, 1)
    return partial.out.astype(jnp.float32) / denom[..., None]


def attend(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    visible: Bool[Array, "B #K S"],
    *,
    scale: float,
) -> AttentionPartial:
    """One query per row and head over full-precision tokens, of which some are visible.

    Query heads are grouped: head n reads KV head n // (N // K). Scores are `scale * query . key`.
    """
    batch, heads, dim = query.shape
    score = scores(query, key, visible, scale=scale)
    top, weight = softmax_weights(score)
    out = jnp.einsum("bkgs,bksh->bkgh", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return AttentionPartial(
        out.reshape(batch, heads, dim),
        top.reshape(batch, heads),
        weight.sum(-1).reshape(batch, heads),
    )


def attention_weights(
    score: Float[Array, "B K G S"], log_sum_exp: Float[Array, "B N"]
) -> Float[Array, "B K S"]:
    """Softmax weights of tokens with these `scores`, summed over the query heads of each KV head.

    `log_sum_exp` is that of all that the query attends to, of which these tokens may be a part.
    """
    return jnp.exp(score - log_sum_exp.reshape(*score.shape[:3], 1)).sum(2)


def scores(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K S H"],
    visible: Bool[Array, "B #K S"],
    *,
    scale: float,
) -> Float[Array, "B K G S"]:
    """`scale * query . key` by KV head and its query heads, `NO_SCORE` where a token is not visible."""
    batch, heads, dim = query.shape
    kv_heads = key.shape[1]
    # Operands keep the cache's dtype (no converted copy of it); products accumulate in float32.
    grouped = query.astype(key.dtype).reshape(batch, kv_heads, heads // kv_heads, dim)
    # Keys on the left: XLA:CPU then reads them as they lie (1.2x the speed of query . key; measured).
    score = jnp.einsum("bksh,bkgh->bksg", key, grouped, preferred_element_type=jnp.float32).swapaxes(2, 3)
    return jnp.where(visible[:, :, None, :], score * scale, NO_SCORE)


def softmax_weights(score: Float[Array, "*B S"]) -> tuple[Float[Array, "*B"], Float[Array, "*B S"]]:
    """`max_t s_t` and `exp(s_t - max)`; unseen tokens have `NO_SCORE` and weigh 0."""
    top = score.max(-1)
    # exp(NO_SCORE - x) is exactly 0 for every score x, so only a row of unseen tokens needs care.
    shift = jnp.where(top > NO_SCORE, top, 0)
    return top, jnp.exp(score - shift[..., None])
