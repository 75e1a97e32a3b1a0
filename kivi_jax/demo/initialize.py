"""Weights to start training from: an induction circuit, written down instead of waited for.

To continue "... a b ... a" with b, one layer has to tell every token what stands before it, and the next
has to find the token whose predecessor is the current one. Gradient descent takes thousands of steps to
stumble on the pair, then learns everything else in a hundred. Here the pair is there from the start:

    layer 0   heads 0 and 1 attend to the token 1 and 2 back, and write its code to two subspaces
    layer 1   heads attend to where the current token's (or its predecessor's) code was written

All other branches start at zero, so that embeddings are not drowned. Everything is trained afterwards.
Source: In-context Learning and Induction Heads, arXiv 2209.11895. Read `train.py` next.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kivi_jax.config import ModelConfig
from kivi_jax.model.layer import Attention, query_key_value_columns
from kivi_jax.model.llama import Llama

POSITION_PAIRS = 10  # the fastest channel pairs of a head tell positions apart
CONTENT_PAIRS = 16  # the slowest compare contents; they turn little within the context
POSITION_GAIN = 7.0
CONTENT_GAIN = 2.0
WRITE_GAIN = 0.15


def initialize(config: ModelConfig, seed: int) -> Llama:
    """A float32 model that holds the circuit.

    Raises:
        ValueError: the model is too small for it: fewer than two layers, four query heads on two KV heads.
    """
    if config.num_layers < 2 or (config.num_heads, config.num_kv_heads) != (4, 2):
        raise ValueError("the circuit needs two layers of four query heads on two KV heads")
    model = Llama(config, rngs=nnx.Rngs(seed))
    for layer in model.layers:
        for silent in (layer.attention.output, layer.mlp.down):
            silent.kernel.set_value(jnp.zeros_like(silent.kernel[...]))
    rng = np.random.default_rng(seed)
    dim = config.hidden_size
    common = _subspace(rng, dim, 1)[:, 0]  # a direction that all embeddings share
    code, before, two_before = (_subspace(rng, dim, config.head_dim, common) for _ in range(3))
    _embed(model, rng, common)
    _look_back(model, common)
    _write(model, code, (before, two_before))
    # Query head: what it reads, and where its KV head's keys are read from.
    _match(model, 0, query=code, key=before)
    _match(model, 2, query=code, key=two_before)
    _match(model, 3, query=before, key=two_before)
    return model


def _subspace(rng: np.random.Generator, dim: int, size: int, *avoid: np.ndarray) -> np.ndarray:
    """An orthonormal basis [dim, size] of a random subspace, orthogonal to the unit vectors `avoid`."""
    basis = rng.standard_normal((dim, size))
    for unit in avoid:
        basis -= np.outer(unit, unit @ basis)
    return np.linalg.qr(basis)[0]


def _embed(model: Llama, rng: np.random.Generator, common: np.ndarray) -> None:
    """Embeddings of about unit length, half of it along `common`."""
    config = model.config
    random = rng.standard_normal((config.vocab_size, config.hidden_size)) / config.hidden_size**0.5
    model.embed.embedding.set_value(jnp.asarray((random + common) * 0.5**0.5, jnp.float32))


def _look_back(model: Llama, common: np.ndarray) -> None:
    """Layer 0: keys that say where they are, and queries of head h that ask for h + 1 before."""
    config, attention = model.config, model.layers[0].attention
    frequency = config.rope.theta ** (-np.arange(config.head_dim // 2) / (config.head_dim // 2))
    gain = np.where(np.arange(config.head_dim // 2) < POSITION_PAIRS, POSITION_GAIN, 0)

    def read(distance: int) -> np.ndarray:
        """The common part of a normalized embedding, turned back by `distance` tokens."""
        angle = -distance * frequency
        turned = np.concatenate([gain * np.cos(angle), gain * np.sin(angle)])
        return np.outer(common, turned) / (config.hidden_size / 2) ** 0.5

    queries, keys, _ = query_key_value_columns(config)
    _set(attention, keys, 0, read(0))
    _set(attention, queries, 0, read(1))
    _set(attention, queries, 1, read(2))


def _write(model: Llama, code: np.ndarray, targets: tuple[np.ndarray, np.ndarray]) -> None:
    """Layer 0: heads 0 and 1 write the code of the token they attend to into their target."""
    attention = model.layers[0].attention
    _, _, values = query_key_value_columns(model.config)
    _set(attention, values, 0, code)
    kernel = np.array(attention.output.kernel[...])
    for head, target in enumerate(targets):
        kernel[head * code.shape[1] : (head + 1) * code.shape[1]] = target.T * WRITE_GAIN
    attention.output.kernel.set_value(jnp.asarray(kernel))


def _match(model: Llama, head: int, *, query: np.ndarray, key: np.ndarray) -> None:
    """Layer 1: query head `head` attends to where its code in `query` stands in `key`."""
    attention = model.layers[1].attention
    queries, keys, _ = query_key_value_columns(model.config)
    _set(attention, queries, head, _slow_channels(query))
    _set(attention, keys, head * model.config.num_kv_heads // model.config.num_heads, _slow_channels(key))


def _slow_channels(code: np.ndarray) -> np.ndarray:
    """The first codes [D, H], moved to the channels that RoPE turns slowest."""
    half = code.shape[1] // 2
    moved = np.zeros_like(code)
    moved[:, half - CONTENT_PAIRS : half] = code[:, :CONTENT_PAIRS]
    moved[:, -CONTENT_PAIRS:] = code[:, CONTENT_PAIRS : 2 * CONTENT_PAIRS]
    return moved * CONTENT_GAIN


def _set(attention: Attention, part: slice, head: int, columns: np.ndarray) -> None:
    """Replace one head's columns [D, H] in the queries', keys' or values' part of the kernel."""
    projection, size = attention.query_key_value, columns.shape[1]
    kernel = np.array(projection.kernel[...])
    kernel[:, part][:, head * size : (head + 1) * size] = columns
    projection.kernel.set_value(jnp.asarray(kernel))
