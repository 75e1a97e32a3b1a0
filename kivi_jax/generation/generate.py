"""`generate`: prompts in, tokens out, in a loop under one jit. Read `text.py` next for strings."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Required, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.checks import instance, warn_beyond, whole
from kivi_jax.generation.prefix import Prefix, check_prefix, extend, fork, prefill, weights_mark
from kivi_jax.generation.sampling import Greedy, Sampler, penalize
from kivi_jax.mesh import on_every_device
from kivi_jax.model.inputs import PerRow, Prompts, read_prompts
from kivi_jax.model.llama import Llama
from pallas_kernels.pytree import Flat, pytree

_log = logging.getLogger(__name__)


@pytree
class Generation:
    """What `generate` returns.

    `tokens` holds each row's new tokens, the end-of-sequence token included, then padding; `lengths`
    counts them. `cache` holds the prompt and all new tokens but each row's last. A row is `finite` if every
    logit that chose one of its tokens was a finite number; else its tokens mean nothing. `log_probs`, if
    asked for, are the tokens' under the model: before penalties, temperature and filters; 0 in the padding.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    cache: KVCache
    finite: Bool[Array, "B"]
    log_probs: Float[Array, "B M"] | None = None


class Drawing(TypedDict, total=False):
    """Arguments of `generate` that say how tokens are drawn, and which end a row."""

    sampler: Sampler | None
    eos_ids: Sequence[int] | int | None
    key: Shaped[Array, "..."] | None


class Decoding(Drawing, total=False):
    """Arguments of `generate` that `complete`, `stream` and their like hand on to it."""

    cache: CacheStrategy | str | None
    prefix: Prefix | None
    max_new_tokens: Required[int]


Ends = Callable[[Int[np.ndarray, "B M"], Int[np.ndarray, "B"]], Bool[np.ndarray, "B"]]
BURST = 32  # tokens between two looks at `ends`


class Draw(NamedTuple):
    """What drawing a token needs besides logits: a key per row, and the tokens a row has seen."""

    keys: Key[Array, "B"] | None
    seen: Bool[Array, "B V"] | None  # only for a sampler with a repetition penalty


def generate(
    model: Llama,
    tokens: Prompts,
    lengths: PerRow,
    *,
    cache: CacheStrategy | str | None = None,
    prefix: Prefix | None = None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: Sequence[int] | int | None = None,
    key: Shaped[Array, "..."] | None = None,
    log_probs: bool = False,
    ends: Ends | None = None,
    block_tokens: int | None = None,
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Prompts are read as `Llama.prefill` does, and the whole decoding loop is one compiled program per shapes,
    strategy and sampler; the host is not asked in between (but for `ends`), and the loop ends when every row
    has. A row's tokens are the same alone as in any batch.

    Args:
        model: the model.
        tokens: prompts, right-padded; what stands at and after a row's length is ignored.
        lengths: tokens of each prompt, from 1 to P; after a `prefix` also 0.
        cache: how keys and values are held: a strategy, or its name ("kivi2").
        prefix: instead of `cache`, what was read before: the prompts follow it, through decoding steps.
            It has a row per prompt, or one that all prompts follow, and can be used again.
        max_new_tokens: the most tokens to add to a row, at least 1.
        sampler: `Greedy()` by default.
        eos_ids: tokens that end a row, or the only one; by default the model's own.
        key: PRNG key for sampling, new style or old: one, from which rows derive theirs by index, or one
            per row.
        log_probs: also give the log-probability of every token.
        ends: is shown `tokens` and `lengths` so far, every 32 tokens, and says which rows have ended for
            another reason, such as a stop string.
        block_tokens: see `Llama.prefill`.

    Inside a caller's `jit`, values are unknown: lengths, token ids and the prefix' model are the caller's to
    check, and so is whether the rows are `finite`, which otherwise is, with a warning.

    Raises:
        ValueError: shapes, lengths or token ids are off, the strategy or the prefix does not fit the model,
            or a sampler that needs a key got none.
    """
    max_new_tokens = check_count(max_new_tokens)
    strategy = check_start(model, cache, prefix)
    tokens, lengths = read_prompts(
        tokens, lengths, vocab_size=model.config.vocab_size, least=0 if prefix is not None else 1
    )
    if ends is not None and not callable(ends):
        raise ValueError(f"{ends=} is no function: pass one of tokens and lengths; texts that end are stop=")
    warn_if_long(model, lengths, prefix, max_new_tokens)
    sampler = check_sampler(sampler)
    keys, eos = row_keys(key, tokens.shape[0]), _as_array(end_ids(model, eos_ids))
    program = _Program(max_new_tokens, sampler, log_probs)
    held = read(
        model,
        tokens,
        lengths,
        cache=strategy,
        prefix=prefix,
        room=max_new_tokens,
        block_tokens=block_tokens,
    )
    loop = _begin(held.logits, held.seen, keys, eos, program, model.mesh)._replace(cache=held.cache)
    flat = Flat.of(model)
    burst = max_new_tokens if ends is None else BURST
    for until in range(burst, max_new_tokens + burst, burst) if max_new_tokens > 1 else ():
        loop = _advance(flat, loop, np.int32(min(until, max_new_tokens)), program)
        if ends is not None:
            ended = ends(np.asarray(loop.tokens), np.asarray(loop.lengths))
            loop = loop._replace(active=loop.active & ~jnp.asarray(ended))
            if not loop.active.any():
                break
    warn_unless_finite(loop.finite)
    return Generation(loop.tokens, loop.lengths, loop.cache, loop.finite, loop.log_probs)


def check_model(model: Llama) -> None:
    """Refuse what is no model.

    Raises:
        ValueError: it is none.
    """
    instance("model", model, Llama, "pass what load gave, the model before its tokenizer")


def check_count(max_new_tokens: Any) -> int:
    """`max_new_tokens` as an int.

    Raises:
        ValueError: it is no whole number from 1 on.
    """
    if (max_new_tokens := whole("max_new_tokens", max_new_tokens)) < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    return max_new_tokens


def check_sampler(sampler: Any) -> Sampler:
    """`sampler`, by default `Greedy()`.

    Raises:
        ValueError: it is none.
    """
    if sampler is None:
        return Greedy()
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):  # a class has the same attributes
        raise ValueError(f"sampler={sampler!r} is no sampler: pass Greedy() or Sample(...)")
    return sampler


def end_ids(model: Llama, eos_ids: Sequence[int] | int | None) -> tuple[int, ...]:
    """Tokens that end a row: those given, be it one alone, or the model's own.

    Raises:
        ValueError: one is no whole number, or given and not in the vocabulary, so that it could end nothing.
    """
    if eos_ids is None:
        return model.config.eos_ids
    given: Any = eos_ids
    ids = tuple(whole("eos_ids", token) for token in (given if np.ndim(given) else [given]))
    if outside := [token for token in ids if not 0 <= token < model.config.vocab_size]:
        raise ValueError(
            f"eos_ids={outside[0]} is not in the model's vocabulary, 0 to {model.config.vocab_size - 1}"
        )
    return ids


def warn_if_long(model: Llama, lengths: Int[Array, "B"], prefix: Prefix | None, max_new_tokens: int) -> None:
    """Say, once for models of its context, that rows may become longer than that, where it is known."""
    held = 0 if prefix is None else prefix.cache.lengths
    if not isinstance(lengths, Tracer) and not isinstance(held, Tracer):
        longest = int(np.max(np.asarray(held) + np.asarray(lengths)))
        warn_beyond(model.config.context, longest + max_new_tokens)


def warn_unless_finite(finite: Bool[Array | np.ndarray, "..."]) -> None:
    """Say once that rows mean nothing, where that is known. Waits for the array."""
    if not isinstance(finite, Tracer) and not finite.all():
        _log.warning(
            "the model's logits are not finite, so the tokens drawn from them mean nothing: "
            "its weights are damaged, or numbers overflow in this dtype; try bfloat16 or float32"
        )


def check_start(
    model: Llama, cache: CacheStrategy | str | None, prefix: Prefix | None
) -> CacheStrategy | None:
    """The strategy to start with, if it is not a prefix that brings its own.

    A prefix' model is known outside of a trace.

    Raises:
        ValueError: it is not exactly one of the two, its name is unknown, or it does not fit the model; or
            model or prefix is none.
    """
    check_model(model)
    if (cache is None) == (prefix is None):
        raise ValueError("pass either cache=, a strategy, or prefix=, which brings its own")
    if prefix is None:
        assert cache is not None  # exactly one of the two
        strategy = strategy_of(cache)
        strategy.check(model.config)
        return strategy
    check_prefix(prefix)
    if prefix.logits.shape[1] != model.config.vocab_size:
        raise ValueError(
            f"the prefix was read by a model of {prefix.logits.shape[1]} tokens, this one has "
            f"{model.config.vocab_size}: read it again with this model"
        )
    if prefix.mark is not None and not isinstance(prefix.mark, Tracer) and prefix.mark != weights_mark(model):
        raise ValueError("the prefix was read by a model with other weights: read it again with this model")
    return None


def read(
    model: Llama,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    *,
    cache: CacheStrategy | None,
    prefix: Prefix | None,
    room: int,
    block_tokens: int | None = None,
) -> Prefix:
    """The prompts read, alone or after a prefix, with room for `room` tokens more a row."""
    if prefix is not None:
        own = fork(prefix, rows=tokens.shape[0], more=tokens.shape[1] + room, mesh=model.mesh)
        return extend(model, own, tokens, lengths)
    assert cache is not None  # `check_start`
    capacity = tokens.shape[1] + room
    return prefill(model, tokens, lengths, cache=cache, capacity=capacity, block_tokens=block_tokens)


def row_keys(key: Any, rows: int) -> Key[Array, "B"] | None:
    """One key per row, from one key or one per row, be they `jax.random.key`s or `jax.random.PRNGKey`s.

    Raises:
        ValueError: it is no key, or there are several keys, but not one per row.
    """
    if key is None:
        return None
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:  # an old-style key: its data alone
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except (TypeError, ValueError):
            raise ValueError("key is no PRNG key: pass key=jax.random.key(seed)") from None
    if key.shape == (rows,):
        return key
    if key.shape:
        raise ValueError(f"{key.shape=} must be () or one key per row, ({rows},)")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))


def start_drawing(sampler: Sampler, keys: Key[Array, "B"] | None, seen: Bool[Array, "B V"]) -> Draw:
    """What drawing the first token after prompts that had the tokens `seen` needs."""
    return Draw(keys, None if sampler.repetition_penalty == 1 else seen)


def draw(
    sampler: Sampler, logits: Float[Array, "B V"], state: Draw, index: Int[Array, "#B"] | Int[Array, ""] | int
) -> tuple[Int[Array, "B"], Draw]:
    """Each row's new token number `index`, and the state for the next one."""
    keys, seen = state
    if seen is not None:
        logits = penalize(logits, seen, sampler.repetition_penalty)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(index), keys.shape))
    token = sampler(logits, keys)
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return token, Draw(state.keys, seen)


def is_finite(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether each row's token has a finite logit: one that is not a number, or infinite, is chosen first."""
    return jnp.isfinite(jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0])


def _as_array(eos_ids: tuple[int, ...]) -> Int[np.ndarray, "E"]:
    """Tokens that end a row, padded with what is no token, so that other ends take no other program."""
    return np.pad(np.array(eos_ids, np.int32), (0, 8 - len(eos_ids) % 8), constant_values=-1)


def _padding(eos: Int[Array, "E"]) -> Int[Array, ""]:
    """What stands after a row's end: the first token that ends one."""
    return jnp.maximum(eos[0], 0)


def _is_end(token: Int[Array, "B"], eos: Int[Array, "E"]) -> Bool[Array, "B"]:
    """Which rows' token ends them."""
    return (token[:, None] == eos[None]).any(-1)


class _Program(NamedTuple):
    """What the compiled loop depends on besides shapes."""

    max_new_tokens: int
    sampler: Sampler
    log_probs: bool


class _Loop(NamedTuple):
    """State of the decoding loop: `token` has been emitted but is not in the cache yet."""

    eos: Int[Array, "E"]
    emitted: Int[Array, ""]  # tokens emitted by the longest row
    token: Int[Array, "B"]
    active: Bool[Array, "B"]  # rows that have not ended
    tokens: Int[Array, "B M"]
    log_probs: Float[Array, "B M"] | None
    lengths: Int[Array, "B"]
    state: Draw
    finite: Bool[Array, "B"]
    cache: Any = None  # a `KVCache`; not passed through `_begin`, which would copy it

    def on_every_device(self, mesh: Mesh | None) -> "_Loop":
        """The loop with all but the cache where every host can read it."""
        return on_every_device(self._replace(cache=None), mesh)._replace(cache=self.cache)


@functools.partial(jax.jit, static_argnames=("program", "mesh"))
def _begin(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: Key[Array, "B"] | None,
    eos: Int[Array, "E"],
    program: _Program,
    mesh: Mesh | None,
) -> _Loop:
    """Each row's first token drawn, after prompts of so many logits."""
    most, sampler = program.max_new_tokens, program.sampler
    token, state = draw(sampler, logits, start_drawing(sampler, keys, seen), 0)
    rows = token.shape[0]
    log_probs = jnp.zeros((rows, most)) if program.log_probs else None
    first = _Loop(
        eos=eos,
        emitted=jnp.int32(1),
        token=token,
        active=~_is_end(token, eos),
        tokens=jnp.full((rows, most), _padding(eos), jnp.int32).at[:, 0].set(token),
        log_probs=None if log_probs is None else log_probs.at[:, 0].set(log_prob(logits, token)),
        lengths=jnp.ones(rows, jnp.int32),
        state=state,
        finite=is_finite(logits, token),
    )
    return first.on_every_device(mesh)


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("first",))
def _advance(flat: Flat[Llama], first: _Loop, until: Int[Array, ""], program: _Program) -> _Loop:
    """The loop after `until` tokens in all, or when every row has ended."""
    model = flat.tree()

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.emitted < until) & loop.active.any()

    padding = _padding(first.eos)

    def step(loop: _Loop) -> _Loop:
        logits, cache = model.decode(loop.token, loop.cache, loop.active)
        token, state = draw(program.sampler, logits, loop.state, loop.emitted)
        finite = loop.finite & (is_finite(logits, token) | ~loop.active)
        token = jnp.where(loop.active, token, padding)
        log_probs = loop.log_probs
        if log_probs is not None:
            chosen = jnp.where(loop.active, log_prob(logits, token), 0)
            log_probs = log_probs.at[:, loop.emitted].set(chosen)
        return loop._replace(
            emitted=loop.emitted + 1,
            token=token,
            active=loop.active & ~_is_end(token, loop.eos),
            tokens=loop.tokens.at[:, loop.emitted].set(token),
            log_probs=log_probs,
            lengths=loop.lengths + loop.active.astype(jnp.int32),
            cache=cache,
            state=state,
            finite=finite,
        )

    return jax.lax.while_loop(unfinished, step, first).on_every_device(model.mesh)


def log_prob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    """Each row's log-probability of its token."""
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
