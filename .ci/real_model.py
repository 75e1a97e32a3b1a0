"""SmolLM2-135M-Instruct from its GGUF file does what transformers does: python .ci/real_model.py FILE.

Converts it, compares logits and greedy tokens with transformers' reading of the same file, chats three turns
through a 2-bit cache, and measures perplexity and passkeys through caches. Needs torch and accelerate.
"""

import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import kivi_jax as kj
from kivi_jax.generation.chat import Chat
from kivi_jax.generation.tokens import pad_prompts

LOGITS = 1e-3
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "How many legs has a spider?",
    "Translate 'good morning' to Spanish.",
    "What do bees make?",
    "Explain gravity to a child.",
    "List the days of the week.",
    "Why is the sky blue?",
]
CACHES = ("full", "kivi2")


def main(
    file: Annotated[Path, typer.Argument(help="SmolLM2-135M-Instruct.Q4_1.gguf")],
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens that are compared.")] = 200,
    prompts: Annotated[int, typer.Option(min=1, max=len(QUESTIONS), help="Prompts they follow.")] = 9,
) -> None:
    """Check it; a failure is an exception."""
    with tempfile.TemporaryDirectory() as folder:
        model_folder = str(Path(folder) / "smollm2")
        run("convert", str(file), model_folder, "--dtype", "float32")
        with ThreadPoolExecutor(1) as beside:  # most of either's time is one core's, compiling
            evaluated = beside.submit(evaluate, model_folder, folder)
            model, tokenizer = kj.load(model_folder, dtype="float32")
            compare(model, tokenizer, file, tokens, prompts)
            chat(model, tokenizer)
            evaluated.result()


def evaluate(model_folder: str, out: str) -> None:
    """Perplexity and passkeys past the residual of 128 tokens, for each cache."""
    text = Path(__file__).parents[1] / "docs" / "explanation" / "cache-algebra.md"
    caches = [word for cache in CACHES for word in ("--cache", cache)]
    sizes = ["--length", "192", "--limit", "2", "--batch", "2", "--out", out]
    run("eval", "perplexity", "--model", model_folder, "--data", str(text), *caches, *sizes)
    run("eval", "passkey", "--model", model_folder, *caches, "--tokens", "256", "--problems", "4")


def run(*words: str) -> None:
    """A command of kivi-jax; what it prints is shown when it has ended."""
    command = [sys.executable, "-m", "kivi_jax.commands.main", *words]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print("$ kivi-jax " + shlex.join(words), done.stdout, sep="\n", flush=True)
    done.check_returncode()


def compare(model: Any, tokenizer: Any, file: Path, tokens: int, count: int) -> None:
    """Logits of random tokens, and greedy continuations of rows alone, against transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64), np.int32)
    with torch.no_grad():
        expected = source(torch.tensor(ids).long()).logits.numpy()
    difference = float(np.abs(np.asarray(model(jnp.asarray(ids))) - expected).max())
    print(f"logits: largest difference {difference:.1e}", flush=True)
    assert difference < LOGITS
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS[:count]
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    padded, lengths = pad_prompts(rows)
    # All rows run to the end, so that as many tokens as possible are compared.
    ours = kj.generate(
        model, jnp.asarray(padded), jnp.asarray(lengths), cache=kj.full(), max_new_tokens=tokens, eos_ids=()
    )
    ours = np.asarray(jax.device_get(ours.tokens))[:, -tokens:]
    options = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        theirs = [source.generate(torch.tensor([row]), **options)[0, len(row) :].numpy() for row in rows]
    equal = [bool((mine == other).all()) for mine, other in zip(ours, theirs, strict=True)]
    print(f"greedy: {tokens} tokens equal on {sum(equal)} of {count} prompts", flush=True)
    assert all(equal)


def chat(model: Any, tokenizer: Any) -> None:
    """Three turns through a 2-bit cache; each says something."""
    talk = Chat(model, tokenizer, cache=kj.kivi(bits=2), context=512)
    for message in ("My name is Ada. Say hello.", "What is 2 + 2?", "What is my name?"):
        reply = tokenizer.decode(list(talk.reply(message, max_new_tokens=24)), skip_special_tokens=True)
        print(f"> {message}\n{reply}", flush=True)
        assert reply.strip()


if __name__ == "__main__":
    typer.run(main)
