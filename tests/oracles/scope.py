"""SCOPE's decoding phase as a list that is physically pruned: NumPy float64, one row and one head."""

import numpy as np

from tests.oracles.kivi import attention


def softmax_weights(query: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    score = np.array(keys) @ query * query.shape[0] ** -0.5
    weight = np.exp(score - score.max())
    return weight / weight.sum()


def by_weight(tokens, weights):
    return list(weights)


class Remembered:
    """G-KV: what a token once weighed fades, and counts until it weighs more."""

    def __init__(self, decay: float):
        self.decay, self.scores = decay, {}

    def __call__(self, tokens, weights):
        old = list(zip(tokens, weights, strict=True))[:-1]
        top = max((weight for _, weight in old), default=1)
        self.scores = {t[0]: max(self.decay * self.scores.get(t[0], 0), weight / top) for t, weight in old}
        return [self.scores.get(position, 0) for position, _, _ in tokens]


class Reserved:
    """VaSE: the tokens whose values have the widest range stay, whatever they weigh."""

    def __init__(self, reserve: int):
        self.reserve = reserve

    def __call__(self, tokens, weights):
        widest = sorted(range(len(tokens)), key=lambda i: np.ptp(tokens[i][2]))[-self.reserve :]
        return [np.inf if i in widest else weight for i, weight in enumerate(weights)]


class ListPool:
    """The kept tokens of one head, oldest first: (position, key, value).

    `prompt` is never pruned, unless `unified`: then it is among the tokens. With `sinks`, the first of a text
    are kept beside the last `recent`; else those that `rank(tokens, weights)` puts highest.
    """

    def __init__(
        self,
        prompt: list[tuple[np.ndarray, np.ndarray]],
        recent: int,
        *,
        sinks: int | None = None,
        unified: bool = False,
        rank=by_weight,
    ):
        self.prompt = [] if unified else prompt
        self.recent, self.sinks, self.rank = recent, sinks, rank
        self.tokens = [(i, key, value) for i, (key, value) in enumerate(prompt)] if unified else []

    def step(self, queries: np.ndarray, position: int, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Take a token and attend to all that is held [G, H]; remembers the weights summed over queries."""
        self.tokens.append((position, key, value))
        keys = [k for k, _ in self.prompt] + [k for _, k, _ in self.tokens]
        values = [v for _, v in self.prompt] + [v for _, _, v in self.tokens]
        weights = sum(softmax_weights(query, keys) for query in queries)
        self.scores = self.rank(self.tokens, weights[len(self.prompt) :])
        return np.stack([attention(query, keys, values) for query in queries])

    def keep(self, count: int) -> None:
        """Prune to the last `recent`, and of the others the heaviest or those at sinks."""
        if self.sinks is not None:
            older, newest = self.tokens[: -self.recent], self.tokens[-self.recent :]
            self.tokens = [token for token in older if token[0] < self.sinks] + newest
            return
        others = range(len(self.tokens) - self.recent)
        ranked = sorted(others, key=lambda i: (self.scores[i], self.tokens[i][0]), reverse=True)
        chosen = set(ranked[: count - self.recent]) | set(range(len(self.tokens))[-self.recent :])
        self.tokens = [token for i, token in enumerate(self.tokens) if i in chosen]

    @property
    def positions(self) -> list[int]:
        return [position for position, _, _ in self.tokens]
