"""Attention one query at a time over a list of tokens, in float64."""

import numpy as np


def attend_tokens(query, keys, values, scale):
    """out, max, denom of one query [H] over lists of keys [H] and of values [H]."""
    if not keys:
        return np.zeros(len(query)), -1e30, 0.0
    scores = [scale * float(np.dot(query, key)) for key in keys]
    top = max(scores)
    weights = [np.exp(score - top) for score in scores]
    out = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return out, top, sum(weights)


def attend(query, key, value, visible, scale):
    """out [B, N, H], max [B, N], denom [B, N] over the slots where `visible` [B, K, S]."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    batch, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    out, top, denom = np.zeros((batch, heads, dim)), np.zeros((batch, heads)), np.zeros((batch, heads))
    for row in range(batch):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            seen = [slot for slot in range(slots) if visible[row][kv][slot]]
            keys, values = [key[row, kv, s] for s in seen], [value[row, kv, s] for s in seen]
            out[row, head], top[row, head], denom[row, head] = attend_tokens(
                query[row, head], keys, values, scale
            )
    return out, top, denom


def ring_visible(start, end, slots):
    """The slots of each row that hold a token t with start <= t < end, after tokens 0..end-1 were written."""
    visible = []
    for first, last in zip(np.asarray(start).tolist(), np.asarray(end).tolist(), strict=True):
        ring = {}
        for token in range(last):
            ring[token % slots] = token
        visible.append([slot in ring and ring[slot] >= first for slot in range(slots)])
    return visible
