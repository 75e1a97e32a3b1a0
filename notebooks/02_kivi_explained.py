# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # KIVI explained
#
# [KIVI](https://arxiv.org/abs/2402.02750) stores keys and values in 2 bits without any tuning. This notebook looks at the
# keys and values of a real (small) model, sees why keys are quantized per channel and values per token, and writes the
# quantizer from scratch.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kivi_jax") is None:  # on Colab: the notebook's repository is not installed yet
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", ".."], check=True)

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import kivi_jax as kj
from kivi_jax.demo import tasks
from pallas_kernels import dequantize, quantize

model, tokenizer = kj.load("demo")
ids = tokenizer(tasks.passkey(seed=0, tokens=512).prompt)["input_ids"][:480]  # whole groups of 32
_, cache = model.prefill(jnp.asarray([ids]), jnp.asarray([len(ids)]), cache=kj.full(), capacity=len(ids))
held = [layer[0].materialize() for layer in cache.layers]
keys, values = (np.asarray([getattr(tokens, name)[0] for tokens in held]) for name in ("key", "value"))
keys.shape  # layers, KV heads, tokens, channels

# %% [markdown]
# ## Keys have outlying channels, values do not
#
# Each picture is one KV head: tokens downwards, channels across. A channel of keys that is large is large in every token
# (rotary embedding turns slowly in the high channels), so a group of numbers that share a scale should lie within a
# channel. Values have no such columns; there a group lies within a token, which can be packed as soon as it leaves the
# residual.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, name, x in zip(axes, ("keys", "values"), (keys, values), strict=True):
    image = axis.imshow(np.abs(x[2, 0]), aspect="auto", cmap="viridis")
    axis.set(title=f"|{name}|, layer 2, head 0", xlabel="channel", ylabel="token")
    figure.colorbar(image, ax=axis)
plt.show()

# %% [markdown]
# ## Quantization, from scratch
#
# A group of numbers becomes codes with one zero and one scale. The library stores zero and scale in 16 bits, rounding the
# zero down and the scale up so that the codes still span the group; in float32 it is what stands here.


# %%
def quantize_from_scratch(x, bits, group, axis):
    x = np.moveaxis(x, axis, -1).astype(np.float32)
    groups = x.reshape(*x.shape[:-1], -1, group)
    zero = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - zero) / np.float32(2**bits - 1)
    code = np.rint(np.clip((groups - zero) / np.where(scale == 0, 1, scale), 0, 2**bits - 1))
    return np.moveaxis((code * scale + zero).reshape(x.shape), -1, axis)


def of_library(x, bits, group, group_axis):
    packed = quantize(
        jnp.asarray(x), bits=bits, group_size=group, group_axis=group_axis, scale_dtype=jnp.float32
    )
    return np.asarray(dequantize(packed)), packed.nbytes


for x, axis, group_axis in ((keys, 2, "token"), (values, 3, "channel")):
    ours, nbytes = of_library(x, 2, 32, group_axis)
    # An exact tie may round either way.
    assert np.mean(~np.isclose(ours, quantize_from_scratch(x, 2, 32, axis), atol=1e-4)) < 1e-3
    print(group_axis, f"{x.size * 2 / nbytes:.2f}x under bfloat16")

# %% [markdown]
# ## Which axis?
#
# What counts is the error of what attention computes from the keys and values, not theirs. `kivi-jax eval study` does this
# with a residual, for logits, and on any model; here are the numbers' own errors.

# %%
errors = {}
for name, x in (("keys", keys), ("values", values)):
    for label, axis in (("per channel", 2), ("per token", 3)):
        for bits in (2, 4):
            off = np.linalg.norm(quantize_from_scratch(x, bits, 32, axis) - x) / np.linalg.norm(x)
            errors[name, label, bits] = off
figure, axis = plt.subplots(figsize=(7, 3))
axis.bar([f"{n}\n{label}\n{bits} bits" for n, label, bits in errors], list(errors.values()))
axis.set(ylabel="relative error")
plt.show()

# %% [markdown]
# ## The residual
#
# The newest R tokens stay in full precision: keys until a block of R is complete, values until they are R tokens old. They
# are what the model looks at most, and they make the group over tokens possible while tokens come one at a time.

# %%
strategy = kj.kivi(bits=2, group_size=32, residual_length=32)
_, packed = model.prefill(jnp.asarray([ids]), jnp.asarray([len(ids)]), cache=strategy, capacity=len(ids) + 40)
for _ in range(40):
    _, packed = model.decode(jnp.asarray([5]), packed)
segment = packed.layers[0][0]
tokens = int(segment.lengths[0])
print(f"{tokens} tokens: keys packed {tokens // 32 * 32}, values packed {tokens - 32}")
print(kj.cache_bytes(packed))
