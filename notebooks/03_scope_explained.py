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
# # SCOPE explained
#
# [SCOPE](https://arxiv.org/abs/2412.13649) selects tokens of the prompt and tokens of the output separately. The task here
# needs a long output of which each part needs its own part of the prompt: a list of numbered questions, all answered.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kivi_jax") is None:  # on Colab: the notebook's repository is not installed yet
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", ".."], check=True)

# %%
import matplotlib.pyplot as plt
import numpy as np

import kivi_jax as kj
from kivi_jax.demo import tasks
from kivi_jax.eval.kept import drift, kept_weight, study

model, tokenizer = kj.load("demo")
problem = tasks.questions(seed=0, count=12)
print(problem.prompt[-120:])
print(problem.answer[:60])

# %% [markdown]
# ## Heavy hitters, and what is kept of them
#
# The model reads the right answer token by token, once with full attention, which says where every token looks, and once
# through each cache, which says what it still holds. Slide keeps the newest tokens and the heaviest of the others in a
# window; adaptive lets the window grow; discontinuous chooses less often; H2O treats prompt and output as one.

# %%
prompt = tokenizer(problem.prompt)["input_ids"]
answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
window, recent = 24, 12
caches = {
    "slide": kj.scope(decode=kj.Slide(window=window, recent=recent)),
    "adaptive": kj.scope(decode=kj.Adaptive(window=window, recent=recent, max_new_tokens=len(answer))),
    "discontinuous": kj.scope(
        decode=kj.Discontinuous(window=window, recent=recent, max_new_tokens=len(answer))
    ),
    "unified H2O": kj.scope(decode=kj.H2O(budget=len(prompt) + window, recent=recent)),
}
weights, held = study(model, prompt, answer, caches)

layer, head = 1, 0
figure, axes = plt.subplots(1, len(held), figsize=(4 * len(held), 3.2), sharey=True)
for axis, (name, seen) in zip(axes, held.items(), strict=True):
    attention = np.log10(np.asarray(weights)[layer, head, -len(answer) :] + 1e-4)
    axis.imshow(np.where(seen[layer, head], attention, np.nan), aspect="auto", cmap="magma")
    axis.set_facecolor("lightgrey")  # not held, or not there yet
    axis.axvline(len(prompt) - 0.5, color="white")
    axis.set(title=f"{name}, layer {layer}", xlabel="token")
axes[0].set_ylabel("decoding step")
plt.show()
for name, seen in held.items():
    print(f"{name:14} holds {100 * kept_weight(weights, seen).mean():.1f} % of full attention's weight")

# %% [markdown]
# ## Drift
#
# Of the prompt's tokens that were heaviest when decoding began, few are so later. What is selected from the prompt once
# must therefore be selected generously; KIVI's 2 bits are the other way to make it small.

# %%
plt.figure(figsize=(5, 3))
for count in (8, 16, 32):
    plt.plot(100 * drift(weights, len(prompt), count), label=f"the {count} heaviest")
plt.xlabel("decoding step")
plt.ylabel("still the heaviest, %")
plt.legend()
plt.show()

# %% [markdown]
# ## Answers

# %%
problems = [tasks.questions(seed=seed, count=12) for seed in range(4)]
for name, cache in {
    "full": kj.full(),
    "slide": caches["slide"],
    "unified H2O": caches["unified H2O"],
}.items():
    texts = kj.complete(
        model, tokenizer, [p.prompt for p in problems], cache=cache, max_new_tokens=len(answer) + 1
    )
    right = np.mean([p.score(text) for p, text in zip(problems, texts, strict=True)])
    print(f"{name:14} {100 * right:.0f} % right")
