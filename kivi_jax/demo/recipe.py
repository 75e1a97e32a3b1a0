"""How the shipped model was made, as values. Read `initialize.py` next."""

from dataclasses import dataclass

from kivi_jax.config import ModelConfig, RopeConfig
from kivi_jax.demo import tokenizer

EVEN = ("passkey", "recall", "questions", "copying")
# A passkey teaches three tokens a row, and its digits stand nowhere else: numbers teach a hundred.
DIGITS = ("numbers", "passkey", "numbers", "questions", "numbers", "recall", "numbers", "copying")


@dataclass(frozen=True)
class Stage:
    """Steps of training on rows of up to `tokens` tokens, of the named tasks in turn."""

    steps: int
    rows: int
    tokens: int
    tasks: tuple[str, ...] = EVEN


@dataclass(frozen=True)
class Cycle:
    """Stages of training under one optimizer, whose moments are zero when it begins.

    The rate of Muon (matrices) and that of Adam (embeddings, norms) are the product of their peak and a
    factor that goes linearly from one (step, factor) in `rates` to the next, counted from the cycle's begin.
    """

    stages: tuple[Stage, ...]
    rates: tuple[tuple[int, float], ...]
    average: bool = False  # whether the cycle results in the mean of the weights it began and ended with

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the order in which a machine adds floats."""

    cycles: tuple[Cycle, ...] = (
        Cycle(
            stages=(
                Stage(steps=400, rows=16, tokens=128),
                Stage(steps=200, rows=8, tokens=256),
                Stage(steps=150, rows=8, tokens=512),
                Stage(steps=100, rows=4, tokens=1024),
                Stage(steps=40, rows=4, tokens=2048),
            ),
            rates=((0, 0.0), (50, 1.0), (540, 1.0), (890, 0.0)),
        ),
        Cycle(
            stages=(
                Stage(steps=120, rows=8, tokens=512, tasks=DIGITS),
                Stage(steps=60, rows=4, tokens=1024, tasks=DIGITS),
                Stage(steps=16, rows=2, tokens=2048, tasks=DIGITS),
            ),
            rates=((0, 0.0), (10, 0.3), (90, 0.3), (196, 0.0)),
        ),
        Cycle(
            stages=(
                Stage(steps=100, rows=4, tokens=1024, tasks=DIGITS),
                Stage(steps=100, rows=2, tokens=2048, tasks=DIGITS),
            ),
            rates=((0, 0.0), (10, 0.3), (100, 0.3), (200, 0.0)),
            average=True,  # few rows a step leave noise in the weights
        ),
    )
    muon_rate: float = 0.02
    adam_rate: float = 0.002
    clip: float = 1.0  # global norm of the gradient
    seed: int = 0

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return sum(cycle.steps for cycle in self.cycles)

    def first_step(self, cycle: int) -> int:
        """The number of the first step of cycle number `cycle`."""
        return sum(before.steps for before in self.cycles[:cycle])

    def find(self, step: int) -> tuple[int, Stage]:
        """The number of the cycle, and the stage, that `step` belongs to.

        Raises:
            ValueError: there is no such step.
        """
        left = step
        for number, cycle in enumerate(self.cycles):
            for stage in cycle.stages:
                if left < stage.steps:
                    return number, stage
                left -= stage.steps
        raise ValueError(f"{step=} must be below {self.steps}")


def model_config() -> ModelConfig:
    """The architecture: 1.6 million parameters, two query heads per KV head.

    theta is large so that half of the channel pairs turn less than once in 2048 tokens: those can compare
    contents at any distance.
    """
    vocab = tokenizer.build().get_vocab()
    return ModelConfig(
        vocab_size=len(vocab),
        hidden_size=192,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope=RopeConfig(theta=1e6),
        tie_word_embeddings=True,
        eos_ids=(vocab[tokenizer.END],),
    )
