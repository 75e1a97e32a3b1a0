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
# keys and values of a small trained model, asks along which axis they should be grouped, and writes KIVI's cache from
# scratch: the quantizer, the bits, and the bookkeeping of what is packed when. Each is checked against the library.
#
# On Colab: choose *File > Upload notebook*, and take this file. The first cell asks for the package: a
# wheel, which `pip wheel --no-deps .` makes in the repository; or set `SOURCE`. Elsewhere, install the package before
# (`pip install '.[notebooks]'`); the cell then does nothing.

# %%
import os
import re
import subprocess
import sys

SOURCE = ""  # for Colab: what pip installs, such as a git+https address; empty: a wheel that you upload

if "google.colab" in sys.modules:
    from google.colab import files

    smi = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True).stdout
    cuda = re.search(r"CUDA Version: (\d+)", smi)
    jax_for_device = f"jax[cuda{cuda[1]}]" if cuda else "jax[tpu]" if "COLAB_TPU_1VM" in os.environ else "jax"
    package = SOURCE or next(iter(files.upload()))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, jax_for_device], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import kivi_jax as kj
from kivi_jax.demo import tasks
from pallas_kernels import dequantize, quantize

model, tokenizer = kj.load("demo", dtype="float32")
ids = tokenizer(tasks.passkey(seed=0, tokens=512).prompt)["input_ids"][:480]  # whole groups of 32
_, cache = model.prefill(jnp.asarray([ids]), jnp.asarray([len(ids)]), cache=kj.full(), capacity=len(ids))
held = [layer[0].materialize() for layer in cache.layers]
keys, values = (
    np.asarray([getattr(tokens, name)[0] for tokens in held], np.float32) for name in ("key", "value")
)
keys.shape  # layers, KV heads, tokens, channels

# %% [markdown]
# ## What keys and values look like
#
# Each picture is one KV head: tokens downwards, channels across. Some channels are large in every token: columns. In keys,
# rotary embedding is one reason, for it turns slowly in some channels. In this small model values have fainter columns,
# too; in the large models that the paper looks at (its figure 2) only keys have them, and a few tower over all others.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, name, x in zip(axes, ("keys", "values"), (keys, values), strict=True):
    image = axis.imshow(np.abs(x[2, 0]), aspect="auto", cmap="viridis")
    axis.set(title=f"|{name}|, layer 2, head 0", xlabel="channel", ylabel="token")
    figure.colorbar(image, ax=axis)
plt.show()

# %% [markdown]
# The same as distributions: on the left all numbers of the model's keys and of its values (keys have the longer tails), on
# the right the mean magnitude of every channel, the largest first, relative to the mean of its head. Were all channels
# alike, that curve would lie at 1.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, x in (("keys", keys), ("values", values)):
    left.hist(x.ravel() / x.std(), bins=120, density=True, histtype="step", label=name)
    magnitude = np.sort(np.abs(x).mean(2), axis=-1)[..., ::-1]
    right.plot((magnitude / magnitude.mean(-1, keepdims=True)).mean((0, 1)), label=name)
left.set(yscale="log", xlabel="number / standard deviation", ylabel="density")
right.set(xlabel="channels of a head, by magnitude", ylabel="magnitude / mean of the head", ylim=0)
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## Why the axis matters
#
# Numbers that share a scale are a group. The step between two codes is the group's span divided by 3 (2 bits have four
# codes), so what a group costs is decided by its span: largest less smallest. A group of 32 can run along the tokens of
# one channel ("per channel") or along the channels of one token ("per token").


# %%
def spans(x, axis):
    groups = np.moveaxis(x, axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, 32)
    return groups.max(-1) - groups.min(-1)


print("mean span of a group of 32, in standard deviations of the layer")
print("layer  keys: per channel  per token     values: per channel  per token")
for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
    means = [spans(x, axis).mean() / x.std() for x in (key, value) for axis in (1, 2)]
    print("{:5}  {:17.2f}  {:9.2f}  {:19.2f}  {:9.2f}".format(layer, *means))

# %% [markdown]
# Keys grouped per channel have the smaller spans, as their columns promise. So do values, in this model; in the paper's
# models they do not. KIVI groups values per token, for reasons that no span shows. A token can be packed by itself, as soon
# as it leaves the residual, while a group along the tokens waits until all of them have come. And attention looks at few
# tokens, so what is lost in one of them should not spread to others.
#
# ## The quantizer, from scratch
#
# A group becomes codes with one zero and one scale, both kept in 16 bits. The zero is rounded down and the scale up, so
# that the codes still span the group, and no number is off by more than half a scale.


# %%
def round_towards(x, direction):
    """To float16, never to the other side of x."""
    y = x.astype(np.float16)
    past = y.astype(np.float32) < x if direction > 0 else y.astype(np.float32) > x
    return np.where(past, np.nextafter(y, np.float16(direction)), y).astype(np.float32)


def quantize_groups(groups, bits):
    """Codes, scale and zero; a group is the last axis."""
    levels = 2**bits - 1
    zero = round_towards(groups.min(-1, keepdims=True), -np.inf)
    scale = round_towards((groups.max(-1, keepdims=True) - zero) / np.float32(levels), np.inf)
    code = np.rint(np.clip((groups - zero) / np.where(scale > 0, scale, 1), 0, levels))
    return code, scale, zero


def round_trip(x, bits, group, axis):
    """What x becomes: quantized in groups along `axis`, and back."""
    moved = np.moveaxis(x, axis, -1)
    code, scale, zero = quantize_groups(moved.reshape(*moved.shape[:-1], -1, group), bits)
    return np.moveaxis((code * scale + zero).reshape(moved.shape), -1, axis)


TOKENS, CHANNELS = -2, -1  # "per channel" groups along the tokens, "per token" along the channels


def assert_same(ours, theirs):
    """Equal, but for a number in a thousand: a device may round an exact tie, or a last bit, the other way."""
    assert np.mean(~np.isclose(ours, theirs, rtol=1e-5, atol=1e-5)) < 1e-3


for bits in (2, 4):
    for x, axis, group_axis in ((keys, TOKENS, "token"), (values, CHANNELS, "channel")):
        packed = quantize(jnp.asarray(x), bits=bits, group_size=32, group_axis=group_axis)
        assert_same(round_trip(x, bits, 32, axis), np.asarray(dequantize(packed)))
        print(f"{bits} bits, groups along {group_axis}s: {x.size * 2 / packed.nbytes:.2f}x under bfloat16")

# %% [markdown]
# ## The bits
#
# Four codes of 2 bits share a byte. Which four? With H channels, byte w of a token holds the codes of channels w, w + H/4,
# w + H/2 and w + 3H/4, the first in its lowest bits. Unpacking is then one shift and one mask for each quarter of the
# channels, and the quarters lie beside each other in the order that arithmetic wants them.


# %%
def pack_bytes(codes, bits):
    parts = np.split(codes.astype(np.uint8), 8 // bits, axis=-1)
    return np.sum([part << (bits * place) for place, part in enumerate(parts)], axis=0, dtype=np.uint8)


groups = np.moveaxis(keys, TOKENS, -1).reshape(*keys.shape[:2], keys.shape[3], -1, 32)
codes = np.moveaxis(quantize_groups(groups, 2)[0].reshape(*groups.shape[:3], -1), -1, TOKENS)
words = quantize(jnp.asarray(keys), bits=2, group_size=32, group_axis="token").words
assert np.mean(pack_bytes(codes, 2) != np.asarray(words)) < 1e-3
print(
    f"{keys.shape[-1]} channels in {words.shape[-1]} bytes; the first token's begin with", words[0, 0, 0, :4]
)

# %% [markdown]
# ## How wrong do numbers get?
#
# The error of the numbers themselves, by bits and by axis.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, name, x in zip(axes, ("keys", "values"), (keys, values), strict=True):
    for label, along in (("per channel", TOKENS), ("per token", CHANNELS)):
        bits = (1, 2, 4, 8)
        off = [np.linalg.norm(round_trip(x, b, 32, along) - x) / np.linalg.norm(x) for b in bits]
        axis.plot(bits, off, marker="o", label=label)
        print(f"{name:6} {label:11}", *(f"{b} bits {error:.4f}" for b, error in zip(bits, off, strict=True)))
    axis.set(title=name, xlabel="bits", yscale="log", xticks=bits)
axes[0].set_ylabel("relative error")
axes[0].legend()
plt.show()

# %% [markdown]
# What counts is the error of what attention computes from them. `kivi_jax.eval.study` measures that, at every position over
# what a cache would hold there, and how far the next token's distribution moves (the KL divergence). Best in bold.
#
# KIVI's choice is keys per channel, values per token. On this model of 4 layers and 1.6 million parameters it is not the
# best, as the spans foretold: values per channel lose less. The paper's order is found in models of billions of
# parameters, whose keys have a few very large channels. `kivi-jax eval study` runs the same on any model and text.

# %%
from rich.console import Console

from kivi_jax.eval.study import Setting, Study, all_settings, table

texts = [tokenizer(tasks.passkey(seed=seed, tokens=512).prompt)["input_ids"][:480] for seed in range(2)]
measured = Study(model, jnp.asarray(texts))
settings = all_settings(model.config, bits=[2], group_sizes=[32], residual_lengths=[32])
records = [measured.measure(setting) for setting in settings]
Console(width=110).print(table("2 bits, all four directions", records))

# %% [markdown]
# ## The residual window
#
# The newest R tokens stay in full precision. They are what the model looks at most, and they make groups along tokens
# possible while tokens come one at a time. Two rules say what is packed after n tokens:
#
# - keys leave the residual a block of R at a time, once R of them have gathered: floor(n / R) R are packed;
# - values leave one by one: max(0, n - R) are packed.
#
# A larger R costs memory and makes less wrong.

# %%
R = 32
n = np.arange(161)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(n, n, color="grey", linestyle=":", label="held")
left.step(n, n // R * R, where="post", label="packed keys")
left.plot(n, np.maximum(n - R, 0), label="packed values")
left.set(title=f"R = {R}", xlabel="tokens", ylabel="tokens")
left.legend()

residuals = (32, 64, 128, 256)
found = [
    measured.measure(Setting(bits=2, group_size=32, residual_length=r, keys="channel", values="token"))
    for r in residuals
]
right.plot(residuals, [record["attention_error"] for record in found], marker="o")
right.set(title="2 bits", xlabel="R", ylabel="attention error", xticks=residuals)
right.set_ylim(0, 1.1 * found[0]["attention_error"])
plt.show()

# %% [markdown]
# ## The cache, from scratch
#
# One row of one layer: four growing arrays, and the two rules. It takes the tokens of the model's first layer one by one,
# and must hold what the library's cache holds, after every one of them. (The library has no growing arrays: it writes the
# same tokens into stores of fixed size.)


# %%
class KiviFromScratch:
    """Keys and values [KV heads, tokens, channels]; packed ones as what their codes mean."""

    def __init__(self, heads, channels, *, bits, group, residual):
        self.bits, self.group, self.residual = bits, group, residual
        nothing = np.zeros((heads, 0, channels), np.float32)
        self.packed_keys = self.recent_keys = self.packed_values = self.recent_values = nothing

    def append(self, key, value):
        self.recent_keys = np.concatenate([self.recent_keys, key[:, None]], axis=1)
        self.recent_values = np.concatenate([self.recent_values, value[:, None]], axis=1)
        if self.recent_keys.shape[1] == self.residual:  # a block is complete
            block = round_trip(self.recent_keys, self.bits, self.group, TOKENS)
            self.packed_keys = np.concatenate([self.packed_keys, block], axis=1)
            self.recent_keys = self.recent_keys[:, :0]
        if self.recent_values.shape[1] > self.residual:  # the oldest one leaves
            oldest = round_trip(self.recent_values[:, :1], self.bits, self.group, CHANNELS)
            self.packed_values = np.concatenate([self.packed_values, oldest], axis=1)
            self.recent_values = self.recent_values[:, 1:]

    def tokens(self):
        return (
            np.concatenate([self.packed_keys, self.recent_keys], axis=1),
            np.concatenate([self.packed_values, self.recent_values], axis=1),
        )

    def attend(self, query):  # [query heads, channels]
        keys, values = self.tokens()
        query = query.reshape(len(keys), -1, query.shape[-1])  # query heads that share a KV head
        score = np.einsum("kgh,ksh->kgs", query, keys) / np.sqrt(query.shape[-1])
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        return np.einsum("kgs,ksh->kgh", weight, values).reshape(-1, query.shape[-1])


def in_order(segment):
    """Keys and values that one of the library's segments holds, oldest first."""
    found = segment.materialize()
    position = np.asarray(found.position[0, 0])
    slots = np.argsort(position)[np.count_nonzero(position < 0) :]
    return np.asarray(found.key[0])[:, slots], np.asarray(found.value[0])[:, slots]


# %%
prompt, steps = ids[:75], ids[75:180]  # decoding crosses several blocks, and begins within one
strategy = kj.kivi(bits=2, group_size=32, residual_length=R)
start = {"cache": strategy, "capacity": 180}
_, packed = model.prefill(jnp.asarray([prompt]), jnp.asarray([len(prompt)]), **start)
_, exact = model.prefill(jnp.asarray([prompt]), jnp.asarray([len(prompt)]), **(start | {"cache": kj.full()}))
ours = KiviFromScratch(model.config.num_kv_heads, model.config.head_dim, bits=2, group=32, residual=R)
for key, value in zip(*(np.swapaxes(x, 0, 1) for x in in_order(exact.layers[0][0])), strict=True):
    ours.append(key, value)

for token in steps:
    for mine, library in zip(ours.tokens(), in_order(packed.layers[0][0]), strict=True):
        assert mine.shape == library.shape
        assert_same(mine, library)
    _, packed = model.decode(jnp.asarray([token]), packed)
    _, exact = model.decode(jnp.asarray([token]), exact)
    ours.append(*(x[:, -1] for x in in_order(exact.layers[0][0])))
print(f"equal after each of {len(steps)} tokens: {ours.packed_keys.shape[1]} keys and", end=" ")
print(f"{ours.packed_values.shape[1]} values are packed, of {len(prompt) + len(steps)}")

# %% [markdown]
# And what attention makes of it, with a random query.

# %%
from pallas_kernels.partials import normalize

query = jax.random.normal(jax.random.key(0), (1, model.config.num_heads, model.config.head_dim))
library = normalize(packed.layers[0][0].attend(query))[0]
np.testing.assert_allclose(ours.attend(np.asarray(query[0])), library, atol=2e-3)
print("largest difference of attention's output:", np.abs(ours.attend(np.asarray(query[0])) - library).max())
print(kj.cache_bytes(packed))
