"""How the GPU kernels cut up the work, by device and shape. Read `pallas_triton.py` next.

Nothing here changes what is computed. The numbers for 2 and 4 bits at head_dim 128 come from sweeps on an
H100 and an H200 (docs/results-gpu.md), the others from compile reports (`kivi-jax bench kernels --aot`);
`kivi-jax bench kernels --sweep` measures them on a GPU and prints the fastest.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Compile-time choices of a decode kernel."""

    splits: int  # programs that share the tokens of one (row, KV head)
    pages: int  # pages of 32 tokens in a tile: what one iteration loads
    heads: int = 16  # query heads that a program answers at most; more take further programs
    warps: int = 1
    stages: int = 2  # tiles in flight

    def __post_init__(self) -> None:
        """Refuse choices that no kernel can be built with."""
        for name, number in dataclasses.asdict(self).items():
            if number < 1:
                raise ValueError(f"{name}={number} must be positive")
        for name in ("pages", "heads", "warps"):
            number = getattr(self, name)
            if number & (number - 1):
                raise ValueError(f"{name}={number} must be a power of two")
        if self.heads > 16:
            raise ValueError(f"heads={self.heads} must be at most 16")


# Programs that run at once: multiprocessors x what registers (8) and shared memory let on one.
_PROGRAMS = {"A100": 108 * 7, "L4": 58 * 4, "L40": 142 * 4, "H100": 132 * 8, "H200": 132 * 8}
_UNKNOWN_DEVICE = 108 * 7
# More splits would not fit in the registers of the program that merges them.
_MOST_SPLITS = 256
# With fewer tokens than this for each program of a wave, latency counts, and tiles are smaller.
_FEW_TOKENS, _FEW_PAGES = 512, 2
# (bits, head_dim, more than 8 query heads for a KV head) -> pages, heads. The fewest instructions per
# code that compile without spills for sm_80 and sm_90 and leave room for 8 programs.
_TILES = {
    (2, 64, False): (8, 16),
    (2, 96, True): (4, 8),
    (2, 256, False): (2, 16),
    (2, 256, True): (2, 8),
    (4, 96, True): (4, 8),
    (4, 128, False): (2, 16),
    (4, 128, True): (2, 16),
    (4, 256, False): (2, 16),
    (4, 256, True): (2, 8),
}
# pages, heads of three stages, which take 24 KB of shared memory for the 20 of `_TILES`: only these devices
# have them for all programs. With groups of more than 32 tokens (fewer scales) `_TILES` is 1 to 3 % faster.
_DEEP_TILES, _DEEP_DEVICES, _DEEP_GROUP = {(2, 128, False): (2, 16)}, ("H100", "H200"), 32
_DEFAULT_TILE = (4, 16)
_DEFAULT_WIDE_TILE = (2, 8)  # 8 bits


def choose(
    *,
    rows: int,
    slots: int,
    heads: int,
    dim: int,
    bits: int,
    group_size: int,
    device_kind: str | None = None,
) -> Tuning:
    """The tuning for `rows` pairs of a row and a KV head, each of `slots` tokens and `heads` query heads.

    `group_size` is that of the keys. `device_kind` is JAX's name of the GPU, by default of the first device.
    """
    words = (device_kind or jax.devices()[0].device_kind).replace("-", " ").split()
    programs = next((n for name, n in _PROGRAMS.items() if name in words), _UNKNOWN_DEVICE)
    kind, stages = (bits, dim, heads > 8), 2
    pages, most_heads = _TILES.get(kind, _DEFAULT_WIDE_TILE if bits == 8 else _DEFAULT_TILE)
    if kind in _DEEP_TILES and group_size <= _DEEP_GROUP and any(name in words for name in _DEEP_DEVICES):
        (pages, most_heads), stages = _DEEP_TILES[kind], 3
    rows *= -(-heads // most_heads)
    if rows * slots < _FEW_TOKENS * programs:
        pages = min(pages, _FEW_PAGES)
    tiles = -(-slots // (32 * pages))
    # One wave: a second, partly filled one would double the time.
    share = -(-tiles // max(1, min(programs // rows, _MOST_SPLITS)))
    # No split without a tile, and no more tiles in flight than a split has.
    return Tuning(splits=-(-tiles // share), pages=pages, heads=most_heads, stages=min(stages, max(2, share)))
