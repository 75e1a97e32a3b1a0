"""Beginnings of prompts that were read before, kept while they are used and there is room."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from kivi_jax.model.chunks import Shared
from pallas_kernels.pytree import tree_bytes


class Match(NamedTuple):
    """What was read of another prompt, and how many of its first tokens are also this one's."""

    shared: Shared
    tokens: int


class SharedPrefixes:
    """What was read of prompts, the least recently used of which go first. In full precision.

    From packed or selected tokens a prompt would go on otherwise than it does when it is read as a whole;
    from these it does not, whatever cache is made of it in the end.
    """

    def __init__(self, most_bytes: int):
        """Keep up to `most_bytes`."""
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[tuple[int, ...], tuple[np.ndarray, Shared]] = OrderedDict()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def find(self, prompt: Sequence[int], *, most: int, least: int) -> Match | None:
        """What shares the most tokens with the prompt, of its first `most`, if these are `least` or more."""
        wanted = np.asarray(prompt[:most])
        common = {name: _common(wanted, tokens) for name, (tokens, _) in self._kept.items()}
        best = max(common, key=common.__getitem__, default=None)
        if best is None or common[best] < max(least, 1):
            return None
        self._kept.move_to_end(best)
        return Match(self._kept[best][1], common[best])

    def wants(self, prompt: tuple[int, ...], size: int) -> bool:
        """Whether `size` bytes read of the prompt fit, and are no part of what is kept."""
        return size <= self.most_bytes and all(name[: len(prompt)] != prompt for name in self._kept)

    def add(self, prompt: tuple[int, ...], shared: Shared) -> None:
        """Keep what fits, in place of what is part of it, and of what was used the longest time ago."""
        for name in [name for name in self._kept if prompt[: len(name)] == name]:
            self._drop(name)
        self._kept[prompt] = np.asarray(prompt), shared
        self.bytes += tree_bytes(shared)
        while self.bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, prompt: tuple[int, ...]) -> None:
        self.bytes -= tree_bytes(self._kept.pop(prompt)[1])


def _common(one: Int[np.ndarray, "P"], other: Int[np.ndarray, "Q"]) -> int:
    """How many first tokens are the same."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if differs.size else size
