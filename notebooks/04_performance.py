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
# # Performance
#
# What caches weigh, how fast a model decodes through them, and why: all measured here, on the device this runs on. On a
# CPU the model is small, so that the notebook ends in minutes; on a GPU or a TPU it is the largest that fits.
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
# %matplotlib inline
import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from rich.console import Console

from kivi_jax.bench import attention, kernels
from kivi_jax.bench.command import machine
from kivi_jax.bench.decode import room, run
from kivi_jax.cache.names import parse_cache
from kivi_jax.console import format_bytes
from kivi_jax.plan.memory import largest_batch, parameter_count, plan_cache
from kivi_jax.plan.plot import contexts_up_to, draw_memory, memory_curves
from kivi_jax.plan.shapes import SHAPES

device = jax.devices()[0]
on_cpu = device.platform == "cpu"
limit = (device.memory_stats() or {}).get("bytes_limit")  # a CPU does not say
memory = limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
old_gpu = device.platform == "gpu" and float(device.compute_capability) < 8  # a T4 has no bfloat16
dtype = "float32" if on_cpu else "float16" if old_gpu else "bfloat16"


def weights_bytes(shape):
    return parameter_count(shape) * jnp.dtype(dtype).itemsize


if on_cpu:
    name = "125m, cut to one of its 12 layers and a quarter of its vocabulary"
    shape = dataclasses.replace(SHAPES["125m"], num_layers=1, vocab_size=8000)
    contexts, batches = (1024, 4096, 16384), (1, 4, 16)
else:
    fits = [name for name in ("llama-8b", "llama-1b", "125m") if weights_bytes(SHAPES[name]) < memory / 2]
    name, shape = fits[0], SHAPES[fits[0]]
    contexts, batches = (2048, 8192, 32768), (1, 4, 16)
console = Console(width=110)
print(machine())
print(f"{name}, {dtype}: weights {format_bytes(weights_bytes(shape))}; this device: {format_bytes(memory)}")

# %% [markdown]
# ## Memory against context
#
# Planned from the shapes of the real arrays, for Llama-3.1-8B. Both axes are logarithmic. SCOPE bounds what is generated,
# here after a prompt of 8,192 tokens; its pool is made at full size at once, so for short rows it weighs more than 2 bits
# do. `kivi-jax inspect llama-8b --plot memory.png` draws the same.

# %%
caches = {name: parse_cache(name) for name in ("full", "kivi4", "kivi2", "kivi2+scope")}
lengths = contexts_up_to(131072)[1::2]
curves = memory_curves(SHAPES["llama-8b"], caches, lengths, batch=1, dtype="bfloat16", prompt_tokens=8192)
draw_memory("Llama-3.1-8B, bfloat16, a prompt of 8,192 tokens", lengths, curves)

# %% [markdown]
# ## Memory against batch
#
# How many rows fit beside the weights, on this device and with the model that is measured below.

# %%
print("rows that fit, by tokens a row")
for name, cache in caches.items():
    fit = functools.partial(largest_batch, shape, cache, dtype=dtype, memory_bytes=memory)
    rows = [fit(context=length, prompt_tokens=min(length, 8192)) for length in (8192, 32768)]
    print(
        f"{name:12}", *(f"{length:,}: {count:,}" for length, count in zip((8192, 32768), rows, strict=True))
    )

# %% [markdown]
# ## Speed against context and batch
#
# One decoding step of the whole model: weights are random and caches hold random numbers, which changes no time. All
# caches of a case take turns, step by step.

# %%
timed = {name: caches[name] for name in ("full", "kivi4", "kivi2")}
shortest = contexts[0]
cases = [(length, 1) for length in contexts] + [(shortest, batch) for batch in batches[1:]]
STEPS = 12
measured = []
for length, batch in cases:
    results = run(
        shape, timed, context=length, new_tokens=STEPS, batch=batch, dtype=dtype, against_torch=False
    )
    measured += [(length, batch, result) for result in results]
    line = ", ".join(f"{result.name} {result.median_ms:.1f} ms" for result in results)
    print(f"{length:,} tokens x {batch}: {line}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name in timed:
    by_case = {(length, batch): result for length, batch, result in measured if result.name == name}
    left.plot(contexts, [by_case[length, 1].median_ms for length in contexts], marker="o", label=name)
    speeds = [1e3 * batch / by_case[shortest, batch].median_ms for batch in batches]
    right.plot(batches, speeds, marker="o", label=name)
for axis, ticks in ((left, contexts), (right, batches)):
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
left.set(xlabel="tokens in the cache, one row", ylabel="ms/step", ylim=0)
right.set(xlabel=f"rows of {shortest:,} tokens", ylabel="tokens/s", ylim=0)
left.legend()
plt.show()

# %% [markdown]
# What was planned is what was held:

# %%
for length, batch, result in measured:
    planned = plan_cache(
        shape,
        timed[result.name],
        batch=batch,
        context=room(length, STEPS),
        prompt_tokens=length,
        dtype=dtype,
    )
    assert planned["total"] == result.cache_bytes
print("planned bytes = held bytes in all", len(measured), "cases")

# %% [markdown]
# ## Roofline
#
# A decoding step reads all weights and the whole cache once and computes little with each byte, so at best it takes as
# long as reading them. The line is that: bytes divided by the bandwidth that a matrix-vector product reaches on this
# device, measured here. A point on the line cannot be made faster without reading less; the distance above it is what
# computing, unpacking and launching add. Rows of a batch (hollow) share the weights' reading and compute for each row. On a
# CPU, unpacking a number costs more than reading a whole one: there a smaller cache saves memory, not time.
# A point below the line says that something else was running while the bandwidth was measured.

# %%
side = 8192 if on_cpu else 16384
matrix, vector = jnp.ones((side, side), dtype), jnp.ones(side, dtype)
product = jax.jit(jnp.dot)
seconds = attention.interleaved_medians({"read": lambda: product(matrix, vector)}, repeats=5)["read"]
bandwidth = matrix.nbytes / seconds
del matrix

embedding = (
    0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
)  # a step reads few rows of it
weights_read = (parameter_count(shape) - embedding) * jnp.dtype(dtype).itemsize
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, marker), color in zip(zip(timed, "os^", strict=True), ("C0", "C1", "C2"), strict=True):
    for length, batch, result in measured:
        if result.name == name:
            axis.plot(
                (weights_read + result.cache_bytes) / 1e6,
                result.median_ms,
                marker,
                color=color,
                fillstyle="full" if batch == 1 else "none",
                label=name if (length, batch) == cases[0] else None,
            )
most = weights_read + max(result.cache_bytes for _, _, result in measured)
axis.plot([0, most / 1e6], [0, 1e3 * most / bandwidth], "k--", label=f"{bandwidth / 1e9:.1f} GB/s")
axis.set(xlabel="MB read by a step: weights and cache", ylabel="ms/step", xlim=0, ylim=0)
axis.legend(title="filled: one row", loc="upper left")
plt.show()
for length, batch, result in measured:
    floor = 1e3 * (weights_read + result.cache_bytes) / bandwidth
    times = f"{result.median_ms:7.2f} ms, {result.median_ms / floor:5.2f}x the line"
    print(f"{length:6,} tokens x {batch:2} {result.name:6} {times}")

# %% [markdown]
# ## Attention alone
#
# The part of a step that the cache changes. On an NVIDIA GPU: every kernel against the fastest bfloat16 attention, and
# its error. Elsewhere: attention over packed tokens, compiled by XLA, against two ways over dense ones. Below 1.00 is
# slower.

# %%
if device.platform == "gpu":
    from pallas_kernels.quantized_attention.cases import GPU

    console.print(kernels.error_table(list(kernels.correctness(GPU[:1]))))
    console.print(kernels.table(list(kernels.speed(GPU[:2]))))
else:
    from pallas_kernels.quantized_attention.cases import BENCHMARK

    small = [case for case in BENCHMARK if case.name in ("125M 1 x 1k", "125M 1 x 8k")]
    console.print(attention.table(attention.run(small, repeats=7)))

# %% [markdown]
# `kivi-jax bench decode`, `bench generation`, `bench throughput`, `bench attention` and `bench kernels` measure these at
# other sizes; what was found on an H100 and on a laptop's CPU, losses included, is in `docs/results-gpu.md` and the README.
