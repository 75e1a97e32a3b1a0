"""Conversations become text as the tokenizer's chat template writes them, whole or up to inside a turn."""

from collections.abc import Mapping, Sequence
from typing import Any

from kivi_jax.generation.tokens import Tokenizer, encode_as_is

Message = Mapping[str, Any]
Conversation = Sequence[Message]
Prompt = str | Conversation

_MARK = "\u241e"  # stands where a turn is cut in two


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def user_turn(text: str, system: str | None = None) -> list[Message]:
    """A conversation of one message, after what the system says if that is given."""
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]


def encode_conversation(tokenizer: Tokenizer, messages: Conversation) -> list[int]:
    """Token ids of a whole conversation, up to where the next reply begins.

    Raises:
        ValueError: see `write`.
    """
    return encode_as_is(tokenizer, write(tokenizer, messages))


def write(tokenizer: Tokenizer, messages: Conversation, *, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """A conversation as the template writes it, up to where the next reply begins.

    `tools` are functions that the model may ask for, as OpenAI's schema describes them.

    Raises:
        ValueError: there is no template, it refuses the conversation, or a message is not one.
    """
    _check(messages)
    if not has_template(tokenizer):
        raise ValueError(
            "the model's tokenizer has no chat template: pass text, and leave out --chat or --system"
        )
    templated: Any = tokenizer
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    try:
        return templated.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def open_turn(tokenizer: Tokenizer, messages: Conversation) -> str:
    """The conversation up to the end of its last message, whose turn stays open.

    Raises:
        ValueError: see `write`; or the template does not show the message.
    """
    _check(messages)
    *before, last = messages
    return _cut(write(tokenizer, [*before, {**last, "content": last["content"] + _MARK}]))[0]


def continue_turn(tokenizer: Tokenizer, messages: Conversation) -> str:
    """What follows an open turn when `messages` go on in it: the first one's text, and all that comes then.

    Raises:
        ValueError: see `write`; or the template does not show the message.
    """
    _check(messages)
    first, *after = messages
    return _cut(write(tokenizer, [{**first, "content": _MARK + first["content"]}, *after]), first=True)[1]


def _check(messages: Conversation) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"a prompt is a text or a list of messages, got {messages!r:.60}")
    if not messages:
        raise ValueError("there must be at least one message")
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            raise ValueError("a message's content is one text, not parts of it: join them")
        called = isinstance(message, Mapping) and message.get("tool_calls")  # instead of saying something
        needed = ("role",) if called else ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(name), str) for name in needed):
            raise ValueError(f"a message is a dict of the strings role and content, got {message!r:.100}")


def _cut(text: str, *, first: bool = False) -> tuple[str, str]:
    before, mark, after = text.partition(_MARK) if first else text.rpartition(_MARK)
    if not mark:
        raise ValueError(
            "the tokenizer's chat template does not show messages as they are, so a turn cannot be read in "
            "two parts: pass whole conversations"
        )
    return before, after
