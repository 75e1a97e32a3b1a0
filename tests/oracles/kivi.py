"""KIVI as the paper tells it: lists of tokens, NumPy float64, one row and one head at a time."""

import numpy as np


def quantize_group(group: np.ndarray, bits: int, trim: float = 0.0) -> np.ndarray:
    """A group after quantization and dequantization, scale and zero unrounded.

    `trim` of its range is beyond the codes at each end.
    """
    levels, span = 2**bits - 1, group.max() - group.min()
    zero = group.min() + trim * span
    scale = (1 - 2 * trim) * span / levels
    if scale == 0:
        return np.full_like(group, zero)
    return np.round(np.clip((group - zero) / scale, 0, levels)) * scale + zero


def attention(query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    """Softmax attention of one query over lists of tokens; zeros over none."""
    if not keys:
        return np.zeros_like(query)
    score = np.array([query @ key for key in keys]) * query.shape[0] ** -0.5
    weight = np.exp(score - score.max())
    return (weight / weight.sum()) @ np.array(values)


class ListKivi:
    """One row and KV head: four growing lists, exactly as the paper keeps them.

    The first `sinks` tokens go to lists of their own, of which the others know nothing. Keys of two
    bits leave out `trim` of a group's range at each end.
    """

    def __init__(
        self,
        key_bits: int,
        value_bits: int,
        key_group: int,
        value_group: int,
        residual: int,
        sinks: int = 0,
        trim: float = 0.0,
    ):
        self.sinks, self.trim = sinks, trim if key_bits == 2 else 0.0
        self.first_keys: list[np.ndarray] = []
        self.first_values: list[np.ndarray] = []
        self.key_bits, self.value_bits = key_bits, value_bits
        self.key_group, self.value_group, self.residual = key_group, value_group, residual
        self.packed_keys: list[np.ndarray] = []
        self.full_keys: list[np.ndarray] = []
        self.packed_values: list[np.ndarray] = []
        self.full_values: list[np.ndarray] = []

    def append(self, key: np.ndarray, value: np.ndarray) -> None:
        """Take a token, then pack a full block of keys and the value that leaves the residual."""
        if len(self.first_keys) < self.sinks:
            self.first_keys.append(np.asarray(key, np.float64))
            self.first_values.append(np.asarray(value, np.float64))
            return
        self.full_keys.append(np.asarray(key, np.float64))
        self.full_values.append(np.asarray(value, np.float64))
        if len(self.full_keys) == self.residual:
            block = np.array(self.full_keys)
            for first in range(0, self.residual, self.key_group):
                part = block[first : first + self.key_group]
                channels = [
                    quantize_group(part[:, c], self.key_bits, self.trim) for c in range(part.shape[1])
                ]
                self.packed_keys.extend(np.stack(channels, axis=1))
            self.full_keys = []
        if len(self.full_values) > self.residual:
            leaving = self.full_values.pop(0)
            groups = leaving.reshape(-1, self.value_group)
            packed = [quantize_group(group, self.value_bits) for group in groups]
            self.packed_values.append(np.concatenate(packed))

    def tokens(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Keys and values as attention sees them, in the order of the tokens."""
        return (
            self.first_keys + self.packed_keys + self.full_keys,
            self.first_values + self.packed_values + self.full_values,
        )

    def attend(self, query: np.ndarray, window: int | None = None) -> np.ndarray:
        """Attention of the next token's query, its own key and value left out."""
        keys, values = self.tokens()
        first = 0 if window is None else max(0, len(keys) - window + 1)
        return attention(np.asarray(query, np.float64), keys[first:], values[first:])
