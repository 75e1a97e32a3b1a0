"""EleutherAI's lm-evaluation-harness on this project's models and caches (extra `eval`).

    python -m kivi_jax.eval.lm_eval run --model kivi-jax --model_args pretrained=DIR,cache=kivi2 --tasks gsm8k

is `lm_eval` with the model `kivi-jax` registered; in Python, importing this module registers it. `cache` is a
name as on the command line, fields after colons: `cache=kivi2:group_size=64:residual_length=32`, or
`cache=kivi2+scope:window=512:recent=256`.

Log-likelihoods read the compressed cache, not a full-precision prefill: see `likelihood.py`.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from rich.console import Console
from rich.progress import Progress

from kivi_jax.cache.names import parse_cache
from kivi_jax.console import run
from kivi_jax.eval.likelihood import continuation_log_probs
from kivi_jax.generation.generate import generate
from kivi_jax.generation.loading import load
from kivi_jax.generation.sampling import Greedy, Sample, Sampler
from kivi_jax.generation.text import decode_after
from kivi_jax.generation.tokens import CONTEXT, pad_prompts
from kivi_jax.mesh import named_mesh

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@register_model("kivi-jax")
class KiviJax(TemplateLM):
    """A checkpoint and a cache strategy, as the harness wants them.

    Args:
        pretrained: a checkpoint's directory or hub name.
        cache: the cache's name, see `names.py`.
        batch_size: rows computed together.
        max_length: the most tokens of context and continuation; by default the model's positions.
        max_gen_toks: the most new tokens where a task does not say.
        dtype: by default float32 on a CPU and bfloat16 elsewhere.
        mesh: devices to use, as in "model=4" or "data=2:model=2": commas separate model_args.
        seed: of tasks that sample; every request draws from a key of its own.
        device: JAX chooses; only here because the harness passes it.
        max_batch_size: the same.
        unknown: whatever else stands in model_args, which is refused.

    Raises:
        ValueError: the checkpoint, its tokenizer or the cache cannot be used, or an argument is unknown.
    """

    def __init__(  # noqa: D107
        self,
        pretrained: str,
        *,
        cache: str = "full",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str | None = None,
        mesh: str | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        del device, max_batch_size
        if unknown:
            raise ValueError(
                f"model_args of kivi-jax has no {', '.join(unknown)}: take pretrained, cache, max_length, "
                "max_gen_toks, dtype, mesh or seed; fields of a cache stand in its name, after colons"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"{batch_size=} must be a positive number; it is not found automatically")
        devices = None if mesh is None else named_mesh(str(mesh).replace(":", ","))
        self.model, tokenizer = load(pretrained, dtype=dtype, mesh=devices)
        self.tokenizer: Any = tokenizer
        if tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer files: copy the tokenizer's files there")
        self.strategy = parse_cache(cache)
        self.strategy.check(self.model.config)
        self.rows = int(batch_size)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self.key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced with: the token that begins a text, else the one that ends it."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """For the harness's file names."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as `complete` makes them; nothing is put before a text that already has its begin."""
        del kwargs
        begin = getattr(self.tokenizer, "bos_token", None)
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, **options)["input_ids"]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        rows = min(self.rows, len(pairs))

        def compute(batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            contexts, continuations = zip(*batch, strict=True)
            scored = continuation_log_probs(
                self.model, contexts, continuations, cache=self.strategy, rows=rows
            )
            return [(float(row.log_probs.sum()), bool(row.greedy.all())) for row in scored]

        answers = self._in_batches(
            pairs, lambda pair: (len(pair[0]), len(pair[1])), compute, "log-likelihoods", disable_tqdm
        )
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The last `max_length` tokens that a model would read, its last prediction being one more."""
        continuation = continuation[-self.max_length :]
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of `max_length` tokens that do not overlap.

        As with the harness's own model for transformers, the token that the tokenizer puts before a text is
        scored, too.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            parts = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                self.prefix_token_id,
                self.max_length,
                1,
            )
            disjoint = [make_disjoint_window(part) for part in parts]
            windows += [(None, context, continuation) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string; prompts that are too long lose their beginning."""
        answers: dict[int, str] = {}
        groups: dict[str, list[tuple[int, str]]] = {}
        for index, request in enumerate(requests):
            text, options = request.args
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((index, text))
        for name, group in groups.items():
            options = dict(normalize_gen_kwargs(json.loads(name), self.max_gen_toks))
            answers |= dict(
                zip(
                    (index for index, _ in group),
                    self._generate(group, options, disable_tqdm=disable_tqdm),
                    strict=True,
                )
            )
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _generate(
        self, group: Sequence[tuple[int, str]], options: dict[str, Any], *, disable_tqdm: bool
    ) -> list[str]:
        """Continuations of numbered texts that share their options."""
        most = options["max_gen_toks"]
        if (room := self.max_length - most) < 1:
            raise ValueError(
                f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}"
            )
        stop = handle_stop_sequences(options["until"], eos=None)
        sampler = _sampler(options)
        prompts = [(index, self.tok_encode(text)[-room:]) for index, text in group]
        rows = min(self.rows, len(prompts))

        def compute(batch: Sequence[tuple[int, list[int]]]) -> list[str]:
            padded = [*batch, *[batch[0]] * (rows - len(batch))]
            tokens, lengths = (jnp.asarray(array) for array in pad_prompts([ids for _, ids in padded]))
            draws = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            numbers = jnp.asarray([index for index, _ in padded])
            out = generate(
                self.model,
                tokens,
                lengths,
                cache=self.strategy,
                max_new_tokens=most,
                sampler=sampler,
                key=None if isinstance(sampler, Greedy) else draws(self.key, numbers),
            )
            new, count = np.asarray(out.tokens), np.asarray(out.lengths)
            texts = [
                decode_after(self.tokenizer, ids[-CONTEXT:], row[:n].tolist())
                for (_, ids), row, n in zip(padded, new, count, strict=True)
            ]
            return [postprocess_generated_text(text, stop, None) for text in texts[: len(batch)]]

        return self._in_batches(prompts, lambda item: len(item[1]), compute, "generation", disable_tqdm)

    def _in_batches(
        self,
        items: Sequence[Request],
        size: Callable[[Request], Any],
        compute: Callable[[Sequence[Request]], list[Answer]],
        name: str,
        quiet: bool,
    ) -> list[Answer]:
        """Answers in the items' order, computed in batches of similar size, the largest first."""
        order = sorted(range(len(items)), key=lambda i: size(items[i]), reverse=True)
        answers: dict[int, Answer] = {}
        with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
            bar = progress.add_task(name, total=len(items))
            for begin in range(0, len(order), self.rows):
                batch = order[begin : begin + self.rows]
                answers |= dict(zip(batch, compute([items[i] for i in batch]), strict=True))
                progress.advance(bar, len(batch))
        return [answers[i] for i in range(len(items))]


def _sampler(options: dict[str, Any]) -> Sampler:
    """What `do_sample` and its numbers ask for.

    Raises:
        ValueError: a number is out of range.
    """
    if not options.get("do_sample") or not options.get("temperature"):
        return Greedy(repetition_penalty=options.get("repetition_penalty", 1.0))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sample(**{name: options[name] for name in names if options.get(name) is not None})


def main() -> None:
    """`lm_eval`'s command line, with the model `kivi-jax`; a user's mistake ends in one line."""
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # the harness's bootstrap forks, which JAX's threads forbid
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    run(cli_evaluate)


if __name__ == "__main__":
    main()
