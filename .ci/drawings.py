"""Draw docs/images/groups.svg and steps.svg: what shares a scale, and what becomes of tokens, by the code.

Run it again where what caches hold has changed:  python .ci/drawings.py
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import kivi_jax as kj
from kivi_jax.cache.prompt_selectors import Prompt
from kivi_jax.cache.segments import Step
from kivi_jax.cache.strategy import append, settle

IMAGES = Path(__file__).parents[1] / "docs" / "images"
# By Okabe and Ito, which people with any kind of color vision tell apart, on light and dark alike.
EXACT, SINK, PACKED, POOL = "#0072B2", "#CC79A7", "#E69F00", "#009E73"
CELL = 15
STYLE = (
    "<style>text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.gone{fill:none;stroke:#999}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


class Canvas:
    """Shapes of an SVG picture: nothing behind them, so that a page's own color shows."""

    def __init__(self) -> None:
        """Begin an empty picture."""
        self.shapes: list[str] = []
        self.width = self.height = 0.0

    def box(self, x: float, y: float, wide: float, high: float, attributes: str) -> None:
        """A rectangle."""
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" {attributes}/>')
        self.width, self.height = max(self.width, x + wide), max(self.height, y + high)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words that begin at x, on a line at y."""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>')
        wide = (7.4 if kind else 6.2) * len(words)
        self.width, self.height = max(self.width, x + wide), max(self.height, y + 4)

    def cell(self, x: float, y: float, color: str, shade: float = 1.0) -> None:
        """A number or a token."""
        self.box(x, y, CELL - 2, CELL - 2, f'fill="{color}" fill-opacity="{shade:g}"')

    def save(self, path: Path) -> None:
        """Write the picture."""
        size = f"{self.width + 8:.0f} {self.height + 8:.0f}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
        path.write_text("\n".join([head, STYLE, *self.shapes, "</svg>", ""]), "utf-8")


def legend(canvas: Canvas, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """One color a line."""
    for i, (color, words) in enumerate(entries):
        canvas.cell(0, y + i * (CELL + 4), color)
        canvas.text(CELL + 6, y + i * (CELL + 4) + 11, words)


class Shared(NamedTuple):
    """Which numbers of a [tokens, channels] array share a scale, by number; -1: none, full precision."""

    title: str
    groups: np.ndarray
    colors: list[str]  # of each token


def kivi_groups(tokens: int, channels: int, *, residual: int, sinks: int, size: int) -> Iterator[Shared]:
    """Keys and values of KIVI: packed are what `KiviTokens` says."""
    token, channel = np.arange(tokens)[:, None] - sinks, np.arange(channels)[None]
    n = tokens - sinks
    colors = [SINK if t < 0 else EXACT for t in token[:, 0]]
    for title, group, packed in (
        ("keys: a channel of some tokens", token // size * channels + channel, n // residual * residual),
        ("values: some channels of a token", token * channels + channel // size, n - residual),
    ):
        held = (token >= 0) & (token < packed)
        yield Shared(title, np.where(held, group, -1), colors)


def pool_groups(slots: int, channels: int, *, recent: int, size: int) -> Shared:
    """A packed pool, keys and values alike."""
    slot, channel = np.arange(slots)[:, None], np.arange(channels)[None]
    group = np.where(slot < slots - recent, slot * channels + channel // size, -1)
    return Shared("a packed pool: some channels of a token", group, [EXACT] * slots)


def draw_groups() -> Canvas:
    """Tokens from left to right, channels from top to bottom; two shades tell neighbouring groups apart."""
    canvas, x = Canvas(), 0.0
    panels = [*kivi_groups(20, 8, residual=8, sinks=2, size=4), pool_groups(10, 8, recent=4, size=4)]
    for panel in panels:
        canvas.text(x, 12, panel.title, "title")
        packed = POOL if panel is panels[-1] else PACKED
        for (t, c), group in np.ndenumerate(panel.groups):
            first = group // 8 + group % 8  # of equal parity: neighbours differ
            shade = 1.0 if group < 0 or first % 2 else 0.55
            at = x + t * CELL, 22 + c * CELL
            canvas.cell(*at, panel.colors[t] if group < 0 else packed, shade)
        x += max(len(panel.groups) * CELL, 7 * len(panel.title)) + 24
    entries = [
        (SINK, "first tokens, in full precision: in no group"),
        (PACKED, "packed: neighbours of one shade share a scale and a zero"),
        (EXACT, "newest tokens, in full precision"),
        (POOL, "packed in the pool of a decoding phase"),
    ]
    legend(canvas, 22 + 8 * CELL + 14, entries)
    return canvas


STRATEGIES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 4, 8),
    "kivi2r": kj.kivi(2, 4, 8, rotate_keys=True, sinks=2),
    "scope": kj.scope(decode=kj.Slide(window=4, recent=2)),
    "kivi2 + scope, prompt selected, pool packed": kj.kivi(
        2,
        4,
        8,
        prompt=kj.StreamingLLM(sinks=4, recent=16),
        decode=kj.Slide(window=4, recent=2),
        pool=kj.PoolQuantization(bits=2, group_size=4),
    ),
}
PROMPT, STEPS, DIM = 24, 7, 8


def states(strategy: kj.CacheStrategy) -> Iterator[list[str | None]]:
    """The color of every token after the prompt, and after each step; None: gone."""
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.normal(size=(2, 1, 1, PROMPT + STEPS, DIM)), jnp.float32)
    lengths, active = jnp.asarray([PROMPT]), jnp.asarray([True])
    keys, values = tokens[:, :, :, :PROMPT]
    prompt = Prompt(keys, values, jnp.zeros(keys.shape[:3]), lengths)
    segments = strategy.hold_prompt(prompt, capacity=PROMPT + STEPS, window=None, layer=0, layers=1)
    kept = list(range(PROMPT))
    if not strategy.prompt.keeps_all(PROMPT):
        positions, count = strategy.prompt.select(prompt, 0, 1, first=strategy.sinks)
        kept = positions[0, 0, : int(count[0])].tolist()
    true = np.asarray(tokens[1, 0, 0])  # values: keys may be turned
    for step in range(STEPS + 1):
        colors: list[str | None] = [None] * (PROMPT + step)
        for segment in segments:
            held = segment.materialize()
            for slot, position in enumerate(np.asarray(held.position[0, 0])):
                if position < 0:
                    continue
                # Only a pool knows positions in the text; the others count what they were given.
                pooled = hasattr(segment, "selector")
                token = int(position) if pooled or position >= len(kept) else kept[position]
                exact = np.allclose(held.value[0, 0, slot], true[token], atol=1e-6)
                color = (POOL if pooled else PACKED) if not exact else EXACT
                colors[token] = SINK if exact and token < strategy.sinks else color
        yield colors
        if step < STEPS:
            key, value = tokens[:, :, :, PROMPT + step]
            ask = jnp.asarray(draw.normal(size=(1, 1, DIM)), jnp.float32)
            grown = append(segments, Step(ask, key, value, jnp.zeros((1, 1), jnp.float32), active, active))
            (segments,) = settle([grown], active, [0])


def draw_steps() -> Canvas:
    """A line of tokens for every strategy: after the prompt, and after some of the steps."""
    canvas, y = Canvas(), 0.0
    for name, strategy in STRATEGIES.items():
        canvas.text(0, y + 12, name, "title")
        for step, colors in enumerate(states(strategy)):
            if step not in (0, 1, STEPS):
                continue
            y += CELL + 3
            words = "the prompt is read" if step == 0 else f"{step} step{'s' * (step > 1)} later"
            canvas.text(0, y + 11, words)
            for token, color in enumerate(colors):
                x = 125 + token * CELL + 6 * (token >= PROMPT)
                if color is None:
                    canvas.box(x + 0.5, y + 0.5, CELL - 3, CELL - 3, 'class="gone"')
                else:
                    canvas.cell(x, y, color)
        y += CELL + 16
    entries = [
        (EXACT, "in full precision"),
        (SINK, "in full precision for good: first tokens"),
        (PACKED, "packed (values; keys leave the newest a block at a time)"),
        (POOL, "packed in the pool"),
    ]
    legend(canvas, y, entries)
    at = y + len(entries) * (CELL + 4)
    canvas.box(0.5, at + 0.5, CELL - 3, CELL - 3, 'class="gone"')
    canvas.text(CELL + 6, at + 11, "gone")
    return canvas


if __name__ == "__main__":
    draw_groups().save(IMAGES / "groups.svg")
    draw_steps().save(IMAGES / "steps.svg")
