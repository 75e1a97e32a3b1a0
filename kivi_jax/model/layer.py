"""One layer of the decoder: its parameters and what it computes, but for attending. Read `llama.py` next."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kivi_jax.config import Activation, ModelConfig
from kivi_jax.mesh import add_parts, mean_of_parts
from kivi_jax.model.rope import Rotate
from pallas_kernels.dispatch import by_kernel_or_xla, with_derivatives_of

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """`x / rms(x) * (scale + offset)` in float32, over the last axis; a larger scale takes the last two."""

    def __init__(self, config: ModelConfig, size: int, *, dtype: DTypeLike, of_heads: bool = False):
        """Create a scale that changes nothing; `of_heads`: on a mesh, `x` is a part of what is normalized."""
        self.epsilon, self.offset, self.of_heads = config.rms_norm_eps, config.norm_offset, of_heads
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` normalized, in its shape and dtype."""
        if x.size > x.shape[-1] or self.of_heads:
            return self._by_xla(x, self.scale[...])
        how = {"epsilon": self.epsilon, "offset": self.offset}
        return by_kernel_or_xla(
            "rms_norm",
            "pallas_kernels.norm",
            lambda kernels: with_derivatives_of(self._by_xla, functools.partial(kernels.rms_norm, **how))(
                x, self.scale[...]
            ),
            lambda: self._by_xla(x, self.scale[...]),
        )

    def _by_xla(self, x: Float[Array, "*B D"], scale: Float[Array, "..."]) -> Float[Array, "*B D"]:
        scale = scale.astype(jnp.float32) + self.offset
        wide = x.shape if x.shape[-1] == scale.size else (*x.shape[:-2], scale.size)
        y = x.astype(jnp.float32).reshape(wide)
        square = jnp.square(y).mean(-1, keepdims=True)
        y *= jax.lax.rsqrt((mean_of_parts(square) if self.of_heads else square) + self.epsilon)
        return (y * jnp.expand_dims(scale, range(y.ndim - 1))).reshape(x.shape).astype(x.dtype)


def query_key_value_columns(config: ModelConfig) -> tuple[slice, slice, slice]:
    """Where queries, keys and values are in what `Attention.query_key_value` returns, each head by head."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return slice(0, queries), slice(queries, queries + keys), slice(queries + keys, queries + 2 * keys)


class Attention(nnx.Module):
    """Projections of grouped-query attention; what is attended to is the cache's business.

    Queries, keys and values are one projection. On their own, keys' and values' kernels [4096, 1024] are so
    narrow that XLA:GPU multiplies them with a single row element by element, writes the 8 MB to memory and
    sums them afterwards: 35 us of a layer's 250 us on an H100. As columns beside the queries' they are part
    of a real matrix product, and cost 6 us.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create both projections, kernels [in, out]."""
        output_bias = config.attention_bias if config.output_bias is None else config.output_bias
        self.head_dim = config.head_dim
        columns = query_key_value_columns(config)
        self.query_key_value = linear(config.attention_bias, dtype, rngs)(
            config.hidden_size, columns[-1].stop
        )
        self.output = linear(output_bias, dtype, rngs, add=True)(columns[0].stop, config.hidden_size)
        self.qk_norm = config.qk_norm
        if config.qk_norm is not None:
            whole = config.qk_norm == "projection"
            self.query_norm, self.key_norm = (
                RMSNorm(
                    config, heads * config.head_dim if whole else config.head_dim, dtype=dtype, of_heads=whole
                )
                for heads in (config.num_heads, config.num_kv_heads)
            )

    def project(self, x: Float[Array, "B T D"], rotate: Rotate) -> tuple[Array, Array, Array]:
        """Query [B, T, N, H], key and value [B, T, K, H]; query and key rotated to their positions."""
        heads = self.query_key_value(x).reshape(*x.shape[:-1], -1, self.head_dim)
        queries = self.output.kernel.shape[0] // self.head_dim  # on a mesh, the device's own
        queries_and_keys, value = jnp.split(heads, [(heads.shape[-2] + queries) // 2], axis=-2)
        if self.qk_norm is not None:
            query, key = jnp.split(queries_and_keys, [queries], axis=-2)
            queries_and_keys = jnp.concatenate([self.query_norm(query), self.key_norm(key)], axis=-2)
        query, key = jnp.split(rotate(queries_and_keys), [queries], axis=-2)
        return query, key, value


class MLP(nnx.Module):
    """A gated MLP, `down(activation(gate(x)) * up(x))`: SwiGLU, GeGLU."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create the three projections, kernels [in, out]."""
        whole = linear(config.mlp_bias, dtype, rngs)
        self.activate = ACTIVATIONS[config.activation]
        self.gate = whole(config.hidden_size, config.intermediate_size)
        self.up = whole(config.hidden_size, config.intermediate_size)
        self.down = linear(config.mlp_bias, dtype, rngs, add=True)(
            config.intermediate_size, config.hidden_size
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        return self.down(self.activate(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Residual block: attention, then MLP, each with a norm before it, on its output, or both."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create the norms and the two sub-blocks."""
        norm = functools.partial(RMSNorm, config, config.hidden_size, dtype=dtype)
        self.norms, self.multiplier = config.norm_placement, config.residual_multiplier
        if self.norms != "post":
            self.attention_norm, self.mlp_norm = norm(), norm()
        if self.norms != "pre":
            self.attention_output_norm, self.mlp_output_norm = norm(), norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def project(self, x: Float[Array, "B T D"], rotate: Rotate) -> tuple[Array, Array, Array]:
        """Query, key and value of the residual stream `x`; see `Attention.project`."""
        return self.attention.project(x if self.norms == "post" else self.attention_norm(x), rotate)

    def finish(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The residual stream after this layer, given what its queries attended to."""
        out = self.attention.output(attended.reshape(*x.shape[:-1], -1).astype(x.dtype))
        x += self._added(out if self.norms == "pre" else self.attention_output_norm(out))
        out = self.mlp(x if self.norms == "post" else self.mlp_norm(x))
        return x + self._added(out if self.norms == "pre" else self.mlp_output_norm(out))

    def _added(self, out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return out if self.multiplier == 1 else (out.astype(jnp.float32) * self.multiplier).astype(out.dtype)


def linear(
    use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs, *, add: bool = False
) -> Callable[[int, int], nnx.Linear]:
    """A linear layer from `inputs` to `outputs`; `add`: on a mesh, of a part of the inputs."""
    product = _dot_and_add if add else jax.lax.dot_general
    return lambda inputs, outputs: nnx.Linear(
        inputs, outputs, use_bias=use_bias, param_dtype=dtype, dot_general=product, rngs=rngs
    )


def _dot_and_add(*operands: Any, **options: Any) -> Array:
    """A product whose terms are on several devices, before any bias."""
    return add_parts(jax.lax.dot_general(*operands, **options))
