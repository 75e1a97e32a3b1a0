"""A request becomes rows of the engine: prompts become tokens, every choice a row with its own seed."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from kivi_jax.generation.requests import Request as Row
from kivi_jax.generation.templates import has_template, write
from kivi_jax.generation.tokens import Tokenizer, encode, encode_as_is
from kivi_jax.serve.errors import Refused
from kivi_jax.serve.schema import ChatRequest, Message, Request, TextRequest


def prompts_of(tokenizer: Tokenizer, request: Request) -> list[list[int]]:
    """Token ids of every prompt that a request has.

    Raises:
        Refused: there is no chat template, or it refuses the conversation, or does not show its tools; there
            is no prompt, or one has no tokens.
    """
    try:
        if isinstance(request, ChatRequest):
            return [encode_as_is(tokenizer, _conversation(tokenizer, request))]
        assert isinstance(request, TextRequest)
        prompts = [
            ids if isinstance(ids, list) else encode(tokenizer, ids) for ids in _listed(request.prompt)
        ]
    except ValueError as error:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise Refused(str(error), param=param) from None
    if not prompts or not all(prompts):
        raise Refused("there must be a prompt, of at least one token", param="prompt")
    return prompts


def rows_of(
    request: Request, prompts: Sequence[Sequence[int]], *, context: int, timeout: float | None
) -> list[Row]:
    """A row for every choice of every prompt, in the order of choices.

    What is sampled for a choice depends on the seed and its number among its prompt's choices alone.

    Raises:
        Refused: a number is one that the engine cannot take.
    """
    seed = secrets.randbits(32) if request.seed is None else request.seed
    echo = isinstance(request, TextRequest) and request.echo
    try:
        return [
            Row(
                tokens=prompt,
                max_new_tokens=max(context - len(prompt), 1) if request.most is None else request.most,
                temperature=request.temperature if request.top_p else 0.0,
                top_p=request.top_p or 1.0,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias=request.bias,
                seed=seed + choice,
                stop=request.stops,
                log_probs=request.top,
                prompt_log_probs=echo and request.top is not None,
                deadline=None if timeout is None else time.monotonic() + timeout,
            )
            for prompt in prompts
            for choice in range(request.n)
        ]
    except ValueError as error:
        raise Refused(str(error)) from None


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """A list of prompts, of which one may be given without a list around it."""
    alone = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if alone else list(prompt)


def _conversation(tokenizer: Tokenizer, request: ChatRequest) -> str:
    if not has_template(tokenizer):
        raise Refused(
            "the model has no chat template: ask /v1/completions, which continues text", param="messages"
        )
    messages = [_as_template(message) for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    if not tools or request.tool_choice == "none":
        return write(tokenizer, messages)
    text = write(tokenizer, messages, tools=tools)
    if text == write(tokenizer, messages):
        raise Refused("the model's chat template does not show tools: leave them out", param="tools")
    return text


def _as_template(message: Message) -> dict[str, Any]:
    """A message as chat templates know it: content is one text, and the arguments of a call an object."""
    found = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        found["content"] = "".join(part.text for part in message.content)
    found["role"] = "system" if message.role == "developer" else message.role
    for call in found.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            raise Refused("the arguments of an earlier call must be JSON", param="messages") from None
    return found
