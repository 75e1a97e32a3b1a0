"""A program compiled while the one before it is compiled and runs. Read `generate.py` next."""

import concurrent.futures
import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.stages import Lowered

from kivi_jax.cache.strategy import KVCache
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import laid, laid_cache

T = TypeVar("T")

_asked = set[Hashable]()


@contextlib.contextmanager
def compiled_meanwhile(lowered: Lowered | None) -> Iterator[None]:
    """Compile what was lowered in a thread, beside the block: calls after it find it compiled.

    XLA lets others run while it compiles; tracing and lowering do not, and are the caller's. What the block
    raises does not wait for the compiler, whose own error is raised at the block's end.
    """
    if lowered is None:
        yield
        return
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        compiling = pool.submit(lowered.compile)
        yield
        compiling.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def is_new(model: Llama, how: Mapping[str, Hashable], arguments: Any) -> bool:
    """Whether this is asked for the first time of such a model and arguments of such shapes.

    Never inside a caller's trace, whose program will be another. Who gets a wrong answer loses only time.
    """
    weights = model.embed.embedding[...]
    leaves, structure = jax.tree.flatten(arguments)
    if any(isinstance(leaf, Tracer) for leaf in (weights, *leaves)):
        return False
    shapes = ((leaf.shape, leaf.dtype) for leaf in leaves)
    this = (model.config, model.mesh, weights.dtype, *how.items(), structure, *shapes)
    if this in _asked:
        return False
    _asked.add(this)
    return True


def lying(model: Llama, others: T, cache: KVCache) -> tuple[T, KVCache]:
    """Shapes of a cache's arrays, and of others beside it, where reading by this model puts them."""
    if model.mesh is not None:
        return laid(others, model.mesh), laid_cache(cache, model.mesh, cache.lengths.shape[0])
    weights = model.embed.embedding[...]
    where = weights.sharding if weights.committed else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (others, cache))
