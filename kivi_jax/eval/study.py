"""What quantizing costs on real activations, by bits, group, residual, and the direction of groups.

No cache is run: a text goes through the model once, and every position attends to what a KIVI cache would
hold when that position is decoded. Unlike a cache this can group keys per token and values per channel, too,
so KIVI's finding can be checked: keys want groups per channel, values per token.

    attention error   |out - out_full| / |out_full| of a layer's attention, all layers given the same input
    logit KL          KL(full || quantized) of the next token in nats, errors growing through the layers

Both are means over the second half of the positions. Source: KIVI (arXiv 2402.02750) table 2 and section 3.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from rich.markup import escape
from rich.table import Table

from kivi_jax.config import ModelConfig
from kivi_jax.figures import COLORS, new_figure
from kivi_jax.model.llama import Llama
from kivi_jax.model.rope import rotation
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import dequantize, quantize

Axis = Literal["channel", "token"]
Attend = Callable[[Array, Array, Array, int | None], Array]  # query, key, value, the layer's window
# Of every record, at least.
FIELDS = ("bits", "group_size", "residual_length", "keys", "values", "attention_error", "logit_kl")
SCALE_BITS = 2 * 16  # a float16 scale and zero per group


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to quantize; `keys` and `values` say along what groups share a scale.

    Per channel, `group_size` consecutive tokens of a channel are a group; per token, that many channels of
    a token, or all of them where a head has fewer.
    """

    bits: int
    group_size: int
    residual_length: int
    keys: Axis
    values: Axis

    @property
    def name(self) -> str:
        """Identifies the setting in a file of records."""
        return "-".join(str(value) for value in asdict(self).values())

    def bits_per_element(self, head_dim: int) -> float:
        """What an element weighs, scales and zeros included, keys and values together."""
        groups = [
            self.group_size if axis == "channel" else min(self.group_size, head_dim) for axis in self.axes
        ]
        return self.bits + sum(SCALE_BITS / size for size in groups) / 2

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of keys and of values."""
        return self.keys, self.values


def all_settings(
    config: ModelConfig, *, bits: Sequence[int], group_sizes: Sequence[int], residual_lengths: Sequence[int]
) -> list[Setting]:
    """Every combination, in all four directions.

    Raises:
        ValueError: a group does not divide a residual length, or head_dim where it is smaller.
    """
    for group, residual in itertools.product(group_sizes, residual_lengths):
        if group < 1 or residual < 1 or residual % group or config.head_dim % min(group, config.head_dim):
            raise ValueError(
                f"the group size {group} must divide the residual length {residual}, and divide "
                f"head_dim={config.head_dim} or be larger"
            )
    axes: tuple[Axis, Axis] = ("channel", "token")
    return [
        Setting(bits=bit, group_size=group, residual_length=residual, keys=keys, values=values)
        for bit, group, residual, keys, values in itertools.product(
            bits, group_sizes, residual_lengths, axes, axes
        )
    ]


class Study:
    """A model and texts, whose full-precision activations and logits are computed once.

    Args:
        model: the model.
        tokens: texts of one length, whole pages.

    Raises:
        ValueError: the texts' length is not a multiple of a page.
    """

    def __init__(self, model: Llama, tokens: Int[Array, "B T"]):  # noqa: D107
        if tokens.shape[1] % PAGE:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens are no whole pages: choose a multiple of {PAGE}"
            )
        self.model, self.tokens = model, tokens
        self.windows = tuple(map(model.config.window_of, range(model.config.num_layers)))
        self.activations, self.logits = _full(model, tokens)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """The setting's numbers: attention error by layer and on average, and logit KL."""
        errors = _attention_errors(self.activations, setting, self.windows)
        divergence = _logit_divergence(self.model, self.tokens, self.logits, setting)
        return asdict(setting) | {
            "bits_per_element": setting.bits_per_element(self.model.config.head_dim),
            "attention_error": float(errors.mean()),
            "attention_error_by_layer": [float(error) for error in errors],
            "logit_kl": float(divergence),
        }


@jax.jit
def _full(model: Llama, tokens: Int[Array, "B T"]) -> tuple[list[tuple[Array, Array, Array]], Array]:
    """Query, key and value of every layer in full precision, and the logits."""
    seen: list[tuple[Array, Array, Array]] = []

    def attend(query: Array, key: Array, value: Array, window: int | None) -> Array:
        seen.append((query, key, value))
        return attend_cached(query, key, value, key, value, window)

    logits = forward(model, tokens, attend)
    return seen, logits


@functools.partial(jax.jit, static_argnames=("setting", "windows"))
def _attention_errors(
    activations: Sequence[tuple[Array, Array, Array]], setting: Setting, windows: tuple[int | None, ...]
) -> Float[Array, "L"]:
    errors: list[Array] = []
    for (query, key, value), window in zip(activations, windows, strict=True):
        full = attend_cached(query, key, value, key, value, window)
        quantized = attend_quantized(query, key, value, setting, window)
        late = slice(query.shape[1] // 2, None)
        off, size = (x[:, late].astype(jnp.float32) for x in (quantized - full, full))
        errors.append(jnp.linalg.norm(off) / jnp.linalg.norm(size))
    return jnp.stack(errors)


@functools.partial(jax.jit, static_argnames="setting")
def _logit_divergence(
    model: Llama,
    tokens: Int[Array, "B T"],
    logits: Float[Array, "B T V"],
    setting: Setting,
) -> Float[Array, ""]:
    def attend(query: Array, key: Array, value: Array, window: int | None) -> Array:
        return attend_quantized(query, key, value, setting, window)

    half = tokens.shape[1] // 2
    expected, got = (jax.nn.log_softmax(x[:, half:]) for x in (logits, forward(model, tokens, attend)))
    return (jnp.exp(expected) * (expected - got)).sum(-1).mean()


def forward(model: Llama, tokens: Int[Array, "B T"], attend: Attend) -> Float[Array, "B T V"]:
    """The model's logits, its layers attending by `attend(query, key, value, window)`.

    Raises:
        ValueError: the model is on a mesh, whose devices have no layer whole.
    """
    if model.mesh is not None:
        raise ValueError("a study reads whole layers: load the model without mesh=")
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1])
    positions = jnp.arange(tokens.shape[1])[None]
    x = model.embedded(tokens)
    for index, layer in enumerate(model.layers):
        query, key, value = layer.project(x, rotation(model.config, index, lengths, positions))
        x = layer.finish(x, attend(query, key, value, model.config.window_of(index)))
    return model.logits(x)


def attend_quantized(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    setting: Setting,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attention of every position over what a cache of this setting would hold when it is decoded."""
    keys = _round_trip(key, setting.bits, setting.group_size, setting.keys)
    values = _round_trip(value, setting.bits, setting.group_size, setting.values)
    cached = jnp.arange(key.shape[1])  # tokens held before a position's own
    edges = {
        "channel": cached
        // setting.residual_length
        * setting.residual_length,  # whole blocks, as KIVI packs keys
        "token": jnp.maximum(cached - setting.residual_length, 0),  # one by one, as it packs values
    }
    return attend_cached(query, key, value, keys, values, window, edges[setting.keys], edges[setting.values])


def attend_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    packed_key: Float[Array, "B T K H"],
    packed_value: Float[Array, "B T K H"],
    window: int | None,
    key_edge: Int[Array, "T"] | int = 0,
    value_edge: Int[Array, "T"] | int = 0,
) -> Float[Array, "B T N H"]:
    """Causal attention in which a position reads the first `edge` tokens from their packed form."""
    batch, tokens, _, dim = query.shape
    grouped = query.reshape(batch, tokens, key.shape[2], -1, dim)
    position, token = jnp.arange(tokens)[:, None], jnp.arange(tokens)[None]

    def packed(edge: Int[Array, "T"] | int) -> Array:
        return token < jnp.broadcast_to(jnp.asarray(edge), (tokens,))[:, None]

    def scores(keys: Array) -> Array:
        return jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32) * dim**-0.5

    visible = token <= position
    if window is not None:
        visible &= token > position - window
    score = jnp.where(packed(key_edge)[None, None, None], scores(packed_key), scores(key))
    weight = jax.nn.softmax(jnp.where(visible[None, None, None], score, -jnp.inf), axis=-1)
    from_packed = packed(value_edge)[None, None, None]
    out = jnp.zeros((), jnp.float32)
    for part, values in (
        (jnp.where(from_packed, weight, 0), packed_value),
        (jnp.where(from_packed, 0, weight), value),
    ):
        out += jnp.einsum("bkgts,bskh->btkgh", part, values.astype(jnp.float32))
    return out.reshape(query.shape).astype(query.dtype)


def _round_trip(
    x: Float[Array, "B T K H"], bits: int, group_size: int, axis: Axis
) -> Float[Array, "B T K H"]:
    """`x` quantized and dequantized."""
    size = group_size if axis == "channel" else min(group_size, x.shape[-1])
    group_axis = "token" if axis == "channel" else "channel"  # the axis that a group runs along
    packed = quantize(x.swapaxes(1, 2), bits=bits, group_size=size, group_axis=group_axis)
    return dequantize(packed, x.dtype).swapaxes(1, 2)


def table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """A row per bits, group and residual; columns of both measures per direction, the best in bold."""
    result = Table(title=escape(title), caption=_finding(records))
    result.add_column("bits, group, residual")
    directions = list(dict.fromkeys((row["keys"], row["values"]) for row in records))
    for measure, (keys, values) in itertools.product(("error", "KL"), directions):
        result.add_column(f"{measure}\nK per {keys}\nV per {values}", justify="right")
    for (bits, group, residual), rows in _by_setting(records):
        cells = [f"{bits}, {group}, {residual}"]
        for measure, form in (("attention_error", "{:.4f}"), ("logit_kl", "{:.5f}")):
            least = min(row[measure] for row in rows)
            texts = (form.format(row[measure]) for row in rows)
            cells += [
                f"[bold]{text}[/]" if row[measure] == least else text
                for row, text in zip(rows, texts, strict=True)
            ]
        result.add_row(*cells)
    return result


def draw(title: str, records: Sequence[Mapping[str, Any]]) -> Any:
    """Bars of both measures, one color per direction."""
    figure = new_figure(9, 7)
    figure.suptitle(title, fontsize=9)
    groups = list(_by_setting(records))
    for axes, measure, label in zip(
        figure.subplots(2, 1),
        ("attention_error", "logit_kl"),
        ("attention error", "logit KL (nats)"),
        strict=True,
    ):
        for i, row in enumerate(groups[0][1]):
            heights = [rows[i][measure] for _, rows in groups]
            places = [x + 0.2 * i - 0.3 for x in range(len(groups))]
            axes.bar(
                places,
                heights,
                width=0.2,
                color=COLORS[i],
                label=f"K per {row['keys']}, V per {row['values']}",
            )
        names = [f"{bits} bit\ngroup {group}\nR {residual}" for (bits, group, residual), _ in groups]
        axes.set_xticks(range(len(groups)), names, fontsize=7)
        axes.set_yscale("log")
        axes.set_ylabel(label)
    figure.axes[0].legend(fontsize=8)
    return figure


def _finding(records: Sequence[Mapping[str, Any]]) -> str:
    """Of how many settings KIVI's choice of directions is the best."""
    parts: list[str] = []
    for measure, name in (("attention_error", "attention error"), ("logit_kl", "logit KL")):
        best = [min(rows, key=lambda row: row[measure]) for _, rows in _by_setting(records)]
        hits = sum((row["keys"], row["values"]) == ("channel", "token") for row in best)
        parts.append(f"{name} in {hits} of {len(best)}")
    return f"keys per channel and values per token (KIVI) have the least {', '.join(parts)} rows"


def _by_setting(
    records: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[tuple[int, int, int], list[Mapping[str, Any]]]]:
    def key(row: Mapping[str, Any]) -> tuple[int, int, int]:
        return row["bits"], row["group_size"], row["residual_length"]

    found = {name: list(rows) for name, rows in itertools.groupby(sorted(records, key=key), key=key)}
    most = max(map(len, found.values()))
    yield from ((name, rows) for name, rows in found.items() if len(rows) == most)  # a cut leaves one in part
