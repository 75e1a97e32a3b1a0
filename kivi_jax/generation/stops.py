"""New tokens become text as they arrive, up to a stop string: pieces that know neither model nor batch."""

from collections.abc import Container, Iterable, Iterator, Sequence

from kivi_jax.generation.tokens import CONTEXT, Tokenizer


class Detokenizer:
    """The text that tokens add to the text of the tokens `before`, in pieces of whole characters.

    A token's text may depend on the one before it (a space that only the first word lacks), so a piece is
    what new tokens add to the text of the previous piece's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """Begin after the tokens `before`, of which the last few count."""
        self.tokenizer = tokenizer
        self.tokens = list(before[-CONTEXT:])
        self.begin, self.shown = 0, len(self.tokens)  # the previous piece is tokens[begin:shown]

    def push(self, token: int) -> str:
        """The next piece; empty while a character is not whole."""
        self.tokens.append(token)
        piece = self._added()
        if not piece or piece.endswith("\ufffd"):  # the first bytes of a character
            return ""
        self.begin, self.shown = self.shown, len(self.tokens)
        return piece

    def finish(self) -> str:
        """What no further token can complete."""
        rest, self.begin, self.shown = self._added(), self.shown, len(self.tokens)
        return rest

    def _added(self) -> str:
        return self._text(len(self.tokens))[len(self._text(self.shown)) :]

    def _text(self, end: int) -> str:
        return self.tokenizer.decode(self.tokens[self.begin : end], skip_special_tokens=True)


class StopFilter:
    """Text that arrives in pieces, up to the stop string that is complete first, itself left out.

    However the text is divided, what comes out is the same.
    """

    def __init__(self, stop: Sequence[str] = ()):
        """See `check_stop` for what may stop."""
        self.stop = check_stop(stop)
        self.held = ""  # may begin a stop string
        self.stopped = False

    def push(self, piece: str) -> str:
        """What is certain to be shown; nothing once it has stopped."""
        if self.stopped:
            return ""
        text = self.held + piece
        if (end := find_stop(text, self.stop)) is not None:
            self.stopped, self.held = True, ""
            return text[:end]
        certain = len(text) - may_begin(text, self.stop)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back in vain."""
        rest, self.held = self.held, ""
        return rest


class Decoder:
    """Tokens in, text out: `Detokenizer` and `StopFilter` in one; tokens in `ends` have no text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        ends: Container[int] = (),
    ):
        """Begin after the tokens `before`.

        Raises:
            ValueError: see `check_stop`.
        """
        self.detokenizer, self.filter, self.ends = Detokenizer(tokenizer, before), StopFilter(stop), ends

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: no further token is of use."""
        return self.filter.stopped

    def push(self, token: int) -> str:
        """Text that is certain to be shown."""
        return "" if token in self.ends else self.filter.push(self.detokenizer.push(token))

    def finish(self) -> str:
        """The rest, after the last token."""
        return self.filter.push(self.detokenizer.finish()) + self.filter.finish()


def decode_stream(
    tokenizer: Tokenizer,
    tokens: Iterable[int],
    before: Sequence[int] = (),
    *,
    stop: Sequence[str] = (),
    ends: Container[int] = (),
) -> Iterator[str]:
    """The text of tokens that arrive one by one after the tokens `before`, in pieces; see `Decoder`.

    Raises:
        ValueError: see `check_stop`.
    """
    decoder = Decoder(tokenizer, before, stop=stop, ends=ends)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
        if decoder.stopped:
            return
    if rest := decoder.finish():
        yield rest


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; one string is a list of one.

    Raises:
        ValueError: one is not a string, or empty.
    """
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop strings must be strings with at least one character, got {list(strings)}")
    return strings


def find_stop(text: str, stop: Iterable[str]) -> int | None:
    """Where the stop string begins that is complete first; None if there is none."""
    found = [(at + len(end), at) for end in stop if (at := text.find(end)) >= 0]
    return min(found)[1] if found else None


def may_begin(text: str, stop: Iterable[str]) -> int:
    """The length of the longest end of `text` that begins a stop string."""
    most = max((len(end) - 1 for end in stop), default=0)
    for length in range(min(most, len(text)), 0, -1):
        if any(length < len(end) and end.startswith(text[-length:]) for end in stop):
            return length
    return 0
