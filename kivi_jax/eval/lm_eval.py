"""EleutherAI's lm-evaluation-harness on this project's models and caches (extra `eval`).

    python -m kivi_jax.eval.lm_eval run --model kivi-jax --model_args pretrained=DIR,cache=kivi2 --tasks gsm8k

is `lm_eval` with the model `kivi-jax` registered; in Python, importing this module registers it. `cache` is a
name as on the command line, fields after colons: `cache=kivi2:group_size=64:residual_length=32`, or
`cache=kivi2+scope:window=512:recent=256`.

Log-likelihoods read the compressed cache, not a full-precision prefill: see `likelihood.py`.
"""

import os
from collections.abc import Sequence
from typing import Any

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
from rich.progress import Progress, track

from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.segments import round_up
from kivi_jax.console import run
from kivi_jax.eval.likelihood import continuation_log_probs
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.loading import load
from kivi_jax.generation.requests import Request
from kivi_jax.mesh import ROWS, named_mesh, parts_of


@register_model("kivi-jax")
class KiviJax(TemplateLM):
    """A checkpoint and a cache strategy, as the harness wants them.

    Args:
        pretrained: a checkpoint's directory or hub name.
        cache: the cache's name, see `names.py`.
        batch_size: rows computed together; of tasks that generate, the engine's slots.
        max_length: the most tokens of context and continuation; by default the model's positions.
        max_gen_toks: the most new tokens where a task does not say.
        dtype: by default float32 on a CPU and bfloat16 elsewhere.
        mesh: devices to use, as in "model=4" or "data=2:model=2": commas separate model_args.
        seed: of tasks that sample; every request has its own, this one and its number.
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
        self.seed = seed

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
        order = sorted(
            range(len(pairs)), key=lambda i: (len(pairs[i][0]), len(pairs[i][1])), reverse=True
        )  # rows of similar sizes together, the largest first
        answers: dict[int, tuple[float, bool]] = {}
        with Progress(console=Console(stderr=True), transient=True, disable=disable_tqdm) as progress:
            bar = progress.add_task("log-likelihoods", total=len(pairs))
            for begin in range(0, len(order), self.rows):
                batch = order[begin : begin + self.rows]
                contexts, continuations = zip(*(pairs[i] for i in batch), strict=True)
                scored = continuation_log_probs(
                    self.model, contexts, continuations, cache=self.strategy, rows=rows
                )
                for i, row in zip(batch, scored, strict=True):
                    answers[i] = float(row.log_probs.sum()), bool(row.greedy.all())
                progress.advance(bar, len(batch))
        for i, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[i])
        return [answers[i] for i in range(len(pairs))]

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
        """Continuations up to the first stop string; prompts that are too long lose their beginning.

        Through an engine: a row ends at its own string, and what several prompts begin with is read once.
        """
        if not requests:
            return []
        asked = [self._asked(index, *request.args) for index, request in enumerate(requests)]
        slots = round_up(min(self.rows, len(asked)), parts_of(self.model.mesh, ROWS))
        context = max(len(request.tokens) + request.max_new_tokens for request in asked)
        with Engine(
            self.model, self.tokenizer, cache=self.strategy, slots=slots, context=context, queue=slots
        ) as engine:
            console = Console(stderr=True)
            found = engine.complete(
                track(asked, "generation", console=console, transient=True, disable=disable_tqdm)
            )
        answers = [
            postprocess_generated_text(answer.text, list(one.stop), None)
            for one, answer in zip(asked, found, strict=True)
        ]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _asked(self, index: int, text: str, options: dict[str, Any]) -> Request:
        """What is asked of the engine, of the text with this number."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        most = options["max_gen_toks"]
        if (room := self.max_length - most) < 1:
            raise ValueError(
                f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}"
            )
        is_random = options.get("do_sample") and options.get("temperature")
        names = ("temperature", "top_k", "top_p", "min_p") if is_random else ()
        drawn = {
            name: options[name] for name in (*names, "repetition_penalty") if options.get(name) is not None
        }
        return Request(
            tokens=self.tok_encode(text)[-room:],
            max_new_tokens=most,
            seed=self.seed + index,
            stop_ids=self.model.config.eos_ids,
            stop=[end for end in handle_stop_sequences(options["until"], eos=None) if end],
            **drawn,
        )


def main() -> None:
    """`lm_eval`'s command line, with the model `kivi-jax`; a user's mistake ends in one line."""
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # the harness's bootstrap forks, which JAX's threads forbid
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    run(cli_evaluate)


if __name__ == "__main__":
    main()
