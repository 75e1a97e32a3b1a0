"""Cache strategies (values that say how tokens are held) and the cache itself. Read `model/llama.py` next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.decode_selectors import DecodeSelector, Slide
from kivi_jax.cache.dense import DenseTokens
from kivi_jax.cache.kivi import KiviQuantization, KiviTokens
from kivi_jax.cache.pool import TokenPool
from kivi_jax.cache.prompt_selectors import KeepAll, Prompt, PromptSelector
from kivi_jax.cache.segments import Segment, Step
from kivi_jax.cache.stores import DEFAULT_GROUP, Given, PoolQuantization, ScaleDtype, hadamard, rotate
from kivi_jax.checks import instance, warn_once
from kivi_jax.config import ModelConfig
from pallas_kernels.dispatch import by_kernel_or_xla
from pallas_kernels.partials import AttentionPartial, merge
from pallas_kernels.pytree import pytree, static, tree_bytes
from pallas_kernels.quantize.packing import words_per_token
from pallas_kernels.quantize.quantization import check_groups
from pallas_kernels.residual.ring import Token, attend_token


@dataclass(frozen=True, kw_only=True)
class CacheStrategy:
    """Which segments a layer's cache is made of. Hashable and static under `jax.jit`.

    The prompt's tokens are chosen by `prompt` and then held in full precision, or packed if there is a
    `quantization`. What is decoded joins them if `decode` is `KeepAll`; else it goes to a pool that
    `decode` bounds. Build one with `full()`, `kivi()` or `scope()`.
    """

    quantization: KiviQuantization | None = None
    prompt: PromptSelector = field(default_factory=KeepAll)
    decode: DecodeSelector | KeepAll = field(default_factory=KeepAll)
    pool: PoolQuantization | None = None

    def __post_init__(self) -> None:
        """Refuse a combination that would not do what it says.

        Raises:
            ValueError: a part is none of its kind; or tokens would be packed, but a unified selector keeps
                them all in its pool.
        """
        for name, part, kinds in (
            ("quantization", self.quantization, KiviQuantization | None),
            ("prompt", self.prompt, PromptSelector),
            ("decode", self.decode, DecodeSelector | KeepAll),
            ("pool", self.pool, PoolQuantization | None),
        ):
            if not isinstance(part, kinds):
                raise ValueError(f"{name}={part!r} is no {name} of a cache: parse_cache reads names")
        if self.quantization is not None and self._unified:
            raise ValueError(
                f"{self.decode} keeps prompt and output in one full-precision pool, so nothing would be "
                "packed: use scope(...), or a decode selector of SCOPE such as Slide"
            )
        if self.prompt != KeepAll() and self.prompt.budget < self.sinks + self.prompt.newest:
            raise ValueError(
                f"{self.prompt} has no room for the first {self.sinks} tokens beside the newest "
                f"{self.prompt.newest}: give it a budget of at least {self.sinks + self.prompt.newest}"
            )

    @property
    def observed(self) -> int:
        """See `PromptSelector.observed`."""
        return self.prompt.observed

    @property
    def expects(self) -> bool:
        """See `PromptSelector.expects`."""
        return self.prompt.expects

    def asks_of(self, window: int | None) -> tuple[int, bool]:
        """`observed` and `expects` of a layer with this window: where there is one, nothing is selected."""
        return (0, False) if window is not None else (self.observed, self.expects)

    @property
    def sinks(self) -> int:
        """How many of a text's first tokens are held in full precision, and kept by any prompt selector."""
        return 0 if self.quantization is None else self.quantization.sinks

    @property
    def _rotates(self) -> bool:
        return self.quantization is not None and self.quantization.rotate_keys

    def turn(self, queries_or_keys: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """Queries or keys, after RoPE, in the basis in which segments take them."""
        return rotate(queries_or_keys) if self._rotates else queries_or_keys

    def split_heads(
        self,
        query: Float[Array, "B N H"],
        key: Float[Array, "B K H"],
        value: Float[Array, "B K H"],
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K H"], Float[Array, "B K H"]]:
        """A step's heads as segments take them: the first two turned; a 16-bit query perhaps as float16."""
        if self.quantization is None:
            return query, key, value

        def by_xla() -> tuple[Array, Array, Array]:
            turned = self.turn(jnp.concatenate([query, key], axis=1))
            return turned[:, : query.shape[1]], turned[:, query.shape[1] :], value

        matrix = hadamard(query.shape[2]) if self._rotates else None
        return by_kernel_or_xla(
            "split_heads",
            "pallas_kernels.heads",
            lambda kernels: kernels.split_heads(query, key, value, matrix),
            by_xla,
        )

    @property
    def _unified(self) -> bool:
        return isinstance(self.decode, DecodeSelector) and self.decode.unified

    def fit(self, config: ModelConfig) -> "CacheStrategy":
        """This strategy with the group sizes that a model gives those left open: equal if both hold alike."""
        packed, pool = self.quantization, self.pool
        return replace(
            self,
            quantization=None if packed is None else packed.fit(config.head_dim),
            pool=None if pool is None else pool.fit(config.head_dim),
        )

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that this strategy does not fit, before anything is computed.

        Said once: that groups of a size nobody named shrink, or that windows leave nothing to select.

        Raises:
            ValueError: a group does not divide the model's head_dim, or codes do not fill bytes.
        """
        selects = self.prompt != KeepAll() or self.decode != KeepAll()
        if selects and all(config.window_of(layer) for layer in range(config.num_layers)):
            warn_once(
                f"every layer of the model has a window of {config.sliding_window} tokens, which bounds its "
                "cache: nothing is selected"
            )
        head_dim = config.head_dim
        if self.fit(config) != self and (size := math.gcd(DEFAULT_GROUP, head_dim)) < DEFAULT_GROUP:
            warn_once(
                f"heads of {head_dim} channels do not divide into groups of 32: groups of values have "
                f"{size}, whose scales weigh more"
            )
        if (pool := self.pool) is not None:
            if pool.group_size is not None and head_dim % pool.group_size:
                raise ValueError(
                    f"the pool's group_size={pool.group_size} must divide the model's {head_dim=}"
                )
            words_per_token(head_dim, pool.bits)
        if (kivi := self.quantization) is None:
            return
        if kivi.value_group_size is not None and head_dim % kivi.value_group_size:
            raise ValueError(
                f"value_group_size={kivi.value_group_size} must divide the model's {head_dim=}: "
                f"pass value_group_size={head_dim} or a divisor of it"
            )
        for bits in (kivi.key_bits, kivi.value_bits):
            check_groups(
                kivi.key_group_size, head_dim, bits=bits, group_size=kivi.key_group_size, group_axis="token"
            )

    def first_held_like(self, config: ModelConfig, layer: int, *, width: int | None = None) -> int:
        """The first layer that holds as much of a prompt, of up to `width` tokens if that is known, as number
        `layer` does.
        """
        selects = width is None or not self.prompt.keeps_all(width)
        if config.window_of(layer) is None and self.prompt.differs_by_layer and selects:
            return layer
        return config.first_windowed_like(layer)

    def first_growing_like(self, config: ModelConfig, layer: int) -> int:
        """The first layer that has as many tokens as number `layer` in the segment that grows."""
        if isinstance(self.decode, DecodeSelector) and not self.decode.unified:  # a pool begins empty
            return config.first_windowed_like(layer)
        return self.first_held_like(config, layer)

    def hold_prompt(
        self,
        prompt: Prompt,
        *,
        capacity: int,
        window: int | None,
        layer: int,
        layers: int,
        number: Int[Array, ""] | None = None,
    ) -> tuple[Segment, ...]:
        """The segments of layer number `layer` of `layers` after a prompt, for rows of up to `capacity`.

        A layer with a window holds the newest tokens that fit into it; nothing is selected there. Layers that
        hold alike may be held by one program: it knows their `number`, by which draws differ, when it runs.

        Raises:
            ValueError: a unified selector's pool is smaller than what the prompt selector keeps.
        """
        drawn_as = jnp.int32(layer) if number is None else number
        width = prompt.keys.shape[2]
        most = width
        keys, values, kept, positions = prompt.keys, prompt.values, prompt.lengths, None
        if window is None and not self.prompt.keeps_all(width):
            most = self.prompt.most(layer, layers, width)
            positions, kept = self.prompt.select(prompt, layer, layers, first=self.sinks)
            index = positions[..., None]
            keys, values = (jnp.take_along_axis(x, index, axis=2) for x in (keys, values))
        keys = self.turn(keys)
        if window is not None or isinstance(self.decode, KeepAll):
            return (self._hold(keys, values, kept, capacity=capacity - width + most, window=window),)
        if self.decode.unified:
            if most >= self.decode.slots:
                raise ValueError(
                    f"the prompt may keep {most} tokens, more than fit into {self.decode}: "
                    "pass a prompt= selector with a budget not above the pool's"
                )
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(width), keys.shape[:3])
            return (self._pool(self.decode, keys, values, positions, kept, prompt.lengths, drawn_as),)
        none = jnp.zeros((*keys.shape[:2], 0), jnp.int32), jnp.zeros_like(kept)
        pool = self._pool(self.decode, keys[:, :, :0], values[:, :, :0], *none, prompt.lengths, drawn_as)
        return self._hold(keys, values, kept, capacity=most, window=None), pool

    def _pool(
        self,
        selector: DecodeSelector,
        keys: Float[Array, "B K M H"],
        values: Float[Array, "B K M H"],
        positions: Int[Array, "B K M"],
        kept: Int[Array, "B"],
        lengths: Int[Array, "B"],
        layer: Int[Array, ""],
    ) -> TokenPool:
        """A pool that starts with the first `kept[b]` of the given tokens of each row."""
        real = jnp.arange(keys.shape[2])[None, None] < kept[:, None, None]
        return TokenPool.of(
            Given(keys, values, jnp.where(real, positions, -1)),
            lengths,
            selector=selector,
            packing=self.pool,
            rotates=not self._rotates,
            layer=layer,
        )

    def _hold(
        self,
        keys: Float[Array, "B K M H"],
        values: Float[Array, "B K M H"],
        kept: Int[Array, "B"],
        *,
        capacity: int,
        window: int | None,
    ) -> Segment:
        """One segment with the first `kept[b]` of the given tokens of each row."""
        if (kivi := self.quantization) is None:
            return DenseTokens.from_prompt(keys, values, kept, capacity=capacity, window=window)
        return KiviTokens.from_prompt(keys, values, kept, kivi, capacity=capacity, window=window)


def full() -> CacheStrategy:
    """Every token in the model's own precision."""
    return CacheStrategy()


def scope(
    *,
    prompt: PromptSelector | None = None,
    decode: DecodeSelector | KeepAll | None = None,
    pool: PoolQuantization | None = None,
) -> CacheStrategy:
    """SCOPE: the prompt selected once, the decoding phase bounded by a budget of its own.

    Args:
        prompt: which tokens of the prompt are stored; by default all.
        decode: what bounds the decoded tokens; by default `Slide()`.
        pool: how to pack the decoded tokens; by default they stay in full precision.

    Source: SCOPE (arXiv 2412.13649).
    """
    return CacheStrategy(prompt=prompt or KeepAll(), decode=decode or Slide(), pool=pool)


def kivi(
    bits: int = 2,
    group_size: int | None = None,
    residual_length: int = 128,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    key_group_size: int | None = None,
    value_group_size: int | None = None,
    scale_dtype: ScaleDtype = "float16",
    rotate_keys: bool = False,
    sinks: int = 0,
    prompt: PromptSelector | None = None,
    decode: DecodeSelector | KeepAll | None = None,
    pool: PoolQuantization | None = None,
) -> CacheStrategy:
    """KIVI: packed tokens behind a full-precision residual of the newest ones.

    Args:
        bits: bits per code, 1, 2, 4 or 8; `key_bits` and `value_bits` override it for one side.
        group_size: tokens per group of a key channel and channels per group of a value token, by default 32;
            `key_group_size` and `value_group_size` override it for one side. Groups of values that nobody
            named shrink to a power of two that divides the model's heads.
        residual_length: R, the newest tokens kept in full precision; a multiple of the key group.
        scale_dtype: how scales and zeros are stored.
        rotate_keys: whether queries and keys are turned by a Hadamard matrix after RoPE. Scores stay what
            they are, and outliers are spread over all channels. Keys of 2 bits then leave out a sixteenth of
            a group's range at each end.
        sinks: how many of a text's first tokens stay in full precision: they are unlike all others, and
            most attention goes to them. A layer with a window forgets them as it forgets any other token;
            whatever a `prompt` selector drops, it is not these.
        prompt: which tokens of the prompt are packed; by default all. Selected in full precision.
        decode: a selector that bounds what is decoded, in a full-precision pool beside the packed prompt;
            by default decoded tokens are packed, too.
        pool: how to pack that pool.

    Raises:
        ValueError: a number is out of range, or the key group does not divide the residual.

    Source: KIVI (arXiv 2402.02750); its default is 2 bits, groups of 32, R = 128. Turned keys are QuaRot's
    (2404.00456); first tokens apart, StreamingLLM's (2309.17453).
    """
    quantization = KiviQuantization(
        key_bits=bits if key_bits is None else key_bits,
        value_bits=bits if value_bits is None else value_bits,
        key_group_size=next(size for size in (key_group_size, group_size, DEFAULT_GROUP) if size is not None),
        value_group_size=group_size if value_group_size is None else value_group_size,
        residual_length=residual_length,
        scale_dtype=scale_dtype,
        rotate_keys=rotate_keys,
        sinks=sinks,
    )
    return CacheStrategy(
        quantization=quantization, prompt=prompt or KeepAll(), decode=decode or KeepAll(), pool=pool
    )


@pytree
class KVCache:
    """All tokens seen so far: per layer a tuple of segments, and how many tokens each row has had.

    `capacity` is the number of tokens a row may reach; it is the caller's to keep.
    """

    layers: tuple[tuple[Segment, ...], ...]
    lengths: Int[Array, "B"]
    strategy: CacheStrategy = static()
    capacity: int = static()


def attend(
    segments: tuple[Segment, ...],
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
) -> AttentionPartial:
    """Attention of a step's query over a layer's tokens, and its own; possibly normalized already."""
    own = Token(key, value)
    if len(segments) == 1 and isinstance(segments[0], KiviTokens):
        return segments[0].attend(query, own)
    held = (segment.attend(query) for segment in segments)
    return merge(*held, attend_token(query, own, scale=query.shape[-1] ** -0.5))


def append(segments: tuple[Segment, ...], step: Step) -> tuple[Segment, ...]:
    """One layer after its last segment has taken a token."""
    return (*segments[:-1], segments[-1].append(step))


def settle(
    layers: Sequence[tuple[Segment, ...]], active: Bool[Array, "B"], alike: Sequence[int]
) -> tuple[tuple[Segment, ...], ...]:
    """All layers after what a step made due is done in the segments that grow.

    What is due in one layer is due in all that hold as many tokens: those of which `alike` says the same
    (see `first_growing_like`).
    """
    settled = list(layers)
    for kind in dict.fromkeys(alike):
        indices = [index for index, held_like in enumerate(alike) if held_like == kind]
        segments = [layers[index][-1] for index in indices]
        growing = type(segments[0]).settle(segments, active)
        for index, last in zip(indices, growing, strict=True):
            settled[index] = (*layers[index][:-1], last)
    return tuple(settled)


def grow(cache: KVCache, tokens: int) -> KVCache:
    """The same cache with a capacity of `tokens` more; only the last segment of a layer takes any."""
    layers = tuple((*segments[:-1], segments[-1].grow(tokens)) for segments in cache.layers)
    return KVCache(layers, cache.lengths, cache.strategy, cache.capacity + tokens)


def shorten(cache: KVCache, length: int) -> KVCache | None:
    """The cache of the first `length` tokens of its only row, none of which is read again.

    None where the others cannot be taken back: tokens have been packed, selected or written over.
    """
    if length == int(cache.lengths[0]):
        return cache
    layers: list[tuple[Segment, ...]] = []
    for segments in cache.layers:
        dense = [part for part in segments if isinstance(part, DenseTokens) and part.window is None]
        if len(dense) < len(segments):
            return None
        layers.append(tuple(replace(part, lengths=jnp.full_like(part.lengths, length)) for part in dense))
    return replace(cache, layers=tuple(layers), lengths=jnp.full_like(cache.lengths, length))


def without(cache: KVCache, rows: Bool[Array, "B"]) -> KVCache:
    """The cache with rows that count no tokens: attending to dense or packed ones then passes over none."""
    return jax.tree.map(lambda x: jnp.where(rows, 0, x) if x.ndim == 1 else x, cache)


def repeat_row(cache: KVCache, rows: int) -> KVCache:
    """A cache of one row, `rows` times."""
    return jax.tree.map(lambda x: jnp.tile(x, (rows, *(1,) * (x.ndim - 1))), cache)


def cache_bytes(cache: KVCache) -> dict[str, int]:
    """Bytes of the cache by part, from the arrays themselves; `total` is their sum.

    `packed`: codes. `scales`: scales and zeros. `rings`: KIVI's residual and sinks. `dense`: full-precision
    tokens. `pool`: tokens of a bounded decoding phase. `metadata`: lengths, positions, weights.

    Raises:
        ValueError: `cache` is something else.
    """
    instance("cache", cache, KVCache, "pass what prefill or decode gave, or a prefix' .cache")
    parts: dict[str, int] = dict.fromkeys(("packed", "scales", "rings", "dense", "pool", "metadata"), 0)
    of_field = {
        "words": "packed",
        "scale": "scales",
        "zero": "scales",
        "key_ring": "rings",
        "value_ring": "rings",
        "keys": "dense",  # unless packed: then a field inside it says so
        "values": "dense",
    }
    parts["metadata"] += tree_bytes(cache.lengths)
    for segment in (segment for layer in cache.layers for segment in layer):
        names = {"store": "pool"} if isinstance(segment, TokenPool) else of_field
        for path, leaf in jax.tree_util.tree_leaves_with_path(segment):
            named = [names[key.name] for key in path if key.name in names]
            parts[named[-1] if named else "metadata"] += tree_bytes(leaf)
    return {**parts, "total": sum(parts.values())}
