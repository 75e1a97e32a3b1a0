"""What reading a prompt has gathered in one layer, block by block. Read `reading.py` next."""

import functools
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kivi_jax.cache.prompt_selectors import Prompt
from kivi_jax.config import ModelConfig
from kivi_jax.model.expected_queries import QuerySums, expected_queries
from kivi_jax.model.rope import rotation


class Read(NamedTuple):
    """One layer's keys and values so far: slot t is token t's. And what selectors ask of the queries."""

    keys: Float[Array, "B K P H"]
    values: Float[Array, "B K P H"]
    weights: Float[Array, "B K P"]  # see `Prompt`
    sums: QuerySums | None  # where a selector expects queries

    def prompt(self, config: ModelConfig, index: int, lengths: Int[Array, "B"]) -> Prompt:
        """What a layer like number `index` knows of prompts that have been read to their end."""
        if self.sums is None:
            return Prompt(self.keys, self.values, self.weights, lengths)
        rotate_at = functools.partial(rotation, config, index, lengths, queries=config.head_dim)
        queries = expected_queries(self.sums, lengths, rotate_at)
        return Prompt(self.keys, self.values, self.weights, lengths, queries)
