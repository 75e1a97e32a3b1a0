"""Which tokens a cache still holds while it decodes, against what full attention looks at.

A text is read as a prompt and a known continuation. Full attention says how much weight every decoded token
gives to every token before it; the cache, decoding the same tokens, says which of those it holds.

Source: SCOPE (arXiv 2412.13649) figures 2 to 4: heavy hitters, and how they change while decoding.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from rich.table import Table

from kivi_jax.cache.pool import TokenPool
from kivi_jax.cache.prompt_selectors import KeepAll
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.eval.study import forward
from kivi_jax.figures import COLORS, new_figure
from kivi_jax.model.llama import Llama

GREY = (0.75, 0.75, 0.75)


@jax.jit
def attention_weights(model: Llama, tokens: Int[Array, "T"]) -> Float[Array, "L K T T"]:
    """Weights of full attention: query position, then token; means over a KV head's query heads.

    A layer with a window has none outside of it. Memory grows with the square of T.
    """
    found: list[Array] = []

    def attend(query: Array, key: Array, value: Array, window: int | None) -> Array:
        batch, length, _, dim = query.shape
        grouped = query.reshape(batch, length, key.shape[2], -1, dim)
        score = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * dim**-0.5
        visible = jnp.tri(length, dtype=bool)
        if window is not None:
            visible &= ~jnp.tri(length, k=-window, dtype=bool)
        weight = jax.nn.softmax(jnp.where(visible[None, None, None], score, -jnp.inf), axis=-1)
        found.append(weight[0].mean(1))
        return jnp.einsum("bkgts,bskh->btkgh", weight, value.astype(jnp.float32)).reshape(query.shape)

    forward(model, tokens[None], attend)
    return jnp.stack(found)


def held_tokens(
    model: Llama,
    prompt: Sequence[int],
    continuation: Sequence[int],
    cache: CacheStrategy,
    advance: Callable[[], object] = lambda: None,
) -> Bool[np.ndarray, "L K steps T"]:
    """Whether the cache held each token when the continuation's tokens attended, their own included.

    `advance` is called after every step.

    Raises:
        ValueError: the cache selects tokens of the prompt, and no longer knows where they stood.
    """
    total = len(prompt) + len(continuation)
    ids = jnp.asarray(prompt, jnp.int32)[None]
    _, held = model.prefill(ids, jnp.asarray([len(prompt)]), cache=cache, capacity=total)
    pooled = all(isinstance(segment, TokenPool) for layer in held.layers for segment in layer)
    if not (pooled or isinstance(cache.prompt, KeepAll)):
        raise ValueError(
            "this cache has forgotten which tokens of the prompt it selected: take prompt=keepall"
        )
    seen = np.zeros((len(held.layers), model.config.num_kv_heads, len(continuation), total), bool)
    for step, token in enumerate(continuation):
        for layer, positions in enumerate(_positions(held)):
            for head, row in enumerate(np.asarray(positions)):
                seen[layer, head, step, row[row >= 0]] = True
        seen[:, :, step, len(prompt) + step] = True
        _, held = model.decode(jnp.asarray([token], jnp.int32), held)
        advance()
    return seen


@jax.jit
def _positions(cache: KVCache) -> tuple[Int[Array, "K S"], ...]:
    """Positions of the tokens each layer holds, -1 for none."""
    found = []
    for segments in cache.layers:
        parts = []
        for tokens in (segment.materialize() for segment in segments):
            heads, slots = tokens.key.shape[1:3]
            parts.append(jnp.broadcast_to(tokens.position[0], (heads, slots)))
        found.append(jnp.concatenate(parts, axis=1))
    return tuple(found)


def kept_weight(
    weights: Float[Array, "L K T T"], held: Bool[np.ndarray, "L K steps T"]
) -> Float[np.ndarray, "L K steps"]:
    """The share of full attention's weight that falls on tokens the cache holds, at every step."""
    steps = held.shape[2]
    return (np.asarray(weights)[:, :, -steps:] * held).sum(-1)


def drift(weights: Float[Array, "L K T T"], prompt: int, count: int) -> Float[np.ndarray, "steps"]:
    """How many of the prompt's `count` heaviest tokens at its end still are the heaviest, at every step.

    Heavy is what has gathered most weight from the last `count` queries; the mean over layers and heads, in
    [0, 1].
    """
    gathered = np.cumsum(np.asarray(weights)[..., :prompt], axis=2)
    recent = gathered.copy()
    recent[:, :, count:] -= gathered[:, :, :-count]
    top = np.argsort(-recent[:, :, prompt - 1 :], axis=-1, kind="stable")[..., :count]
    first = top[:, :, :1]
    return (top[..., None] == first[..., None, :]).any(-1).mean(-1).mean((0, 1))[1:]


def table(shares: Mapping[str, Float[np.ndarray, "L K steps"]]) -> Table:
    """A row for each cache: the weight on what it holds, on average, late, and in the worst head."""
    out = Table(title="full attention's weight on the tokens held, %")
    out.add_column("cache", overflow="fold")
    for heading in ("mean", "last quarter", "worst head"):
        out.add_column(heading, justify="right")
    for name, share in shares.items():
        late = share[..., -(share.shape[2] // 4 or 1) :]
        numbers = (share.mean(), late.mean(), share.mean(-1).min())
        out.add_row(name, *(f"{100 * number:.1f}" for number in numbers))
    return out


def draw_maps(
    weights: Float[Array, "L K T T"],
    held: Mapping[str, Bool[np.ndarray, "L K steps T"]],
    heads: Sequence[Any],
) -> Any:
    """Heat maps of attention while decoding: a row for each cache, a column for each (layer, KV head).

    What a cache no longer holds is grey.
    """
    figure = new_figure(3.4 * len(heads), 2.6 * len(held))
    figure.suptitle("What full attention looks at while decoding, and what caches still hold", fontsize=11)
    axes = figure.subplots(len(held), len(heads), squeeze=False)
    scale = ScalarMappable(Normalize(-4, 0), "magma")
    for row, (name, seen) in zip(axes, held.items(), strict=True):
        for axis, (layer, head) in zip(row, heads, strict=True):
            steps = seen.shape[2]
            here = np.asarray(weights)[layer, head, -steps:]
            axis.imshow(np.log10(here + 1e-4), aspect="auto", cmap=scale.cmap, norm=scale.norm)
            future = np.arange(here.shape[1])[None] > np.arange(-steps, 0)[:, None] + here.shape[1]
            grey = np.zeros((*here.shape, 4))
            grey[~seen[layer, head] & ~future] = (*GREY, 1)
            axis.imshow(grey, aspect="auto")
            axis.axvline(here.shape[1] - steps - 0.5, color="white", linewidth=0.8)
            axis.set_title("\n".join([*textwrap.wrap(name, 36), f"layer {layer}, head {head}"]), fontsize=8)
    axes[-1][0].set_xlabel("token (line: end of the prompt)")
    axes[-1][0].set_ylabel("decoding step")
    figure.colorbar(scale, ax=axes.ravel().tolist(), shrink=0.4, label="attention weight, log10")
    figure.legend(handles=[Patch(color=GREY, label="no longer held")], loc="outside lower right", fontsize=8)
    return figure


def draw_drift(drifts: Mapping[int, Float[np.ndarray, "steps"]]) -> Any:
    """The overlap of `drift` against the decoding step, a line for each count of tokens."""
    figure = new_figure(5, 3)
    axis = figure.subplots()
    for color, (count, overlap) in zip(COLORS, drifts.items(), strict=False):
        axis.plot(np.arange(1, len(overlap) + 1), 100 * overlap, color=color, label=f"the {count} heaviest")
    axis.set(xlabel="decoding step", ylabel="still the heaviest, %", ylim=(0, 100))
    axis.set_title("Heavy tokens of the prompt that stay heavy", fontsize=10)
    axis.legend()
    return figure


def study(
    model: Llama,
    prompt: Sequence[int],
    continuation: Sequence[int],
    caches: Mapping[str, CacheStrategy],
    advance: Callable[[], object] = lambda: None,
) -> tuple[Float[Array, "L K T T"], dict[str, Bool[np.ndarray, "L K steps T"]]]:
    """Full attention's weights over prompt and continuation, and what every cache held at every step.

    `advance` is called after every step of every cache.
    """
    weights = attention_weights(model, jnp.asarray([*prompt, *continuation], jnp.int32))
    return weights, {
        name: held_tokens(model, prompt, continuation, cache, advance) for name, cache in caches.items()
    }
