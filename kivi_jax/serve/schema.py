"""What may be asked: OpenAI's fields, each of them read, or without effect, or refused by its name."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from kivi_jax.serve.errors import Refused, of_fields

WITHOUT_EFFECT = {  # of accounts, bills and stores, which there are none of here
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
}
MOST_CHOICES = 128
MOST_STOPS = 64
Asked = TypeVar("Asked", bound="Request")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, found: Any) -> Any:
        """A field that is null is as one that is left out, as clients send what they do not set."""
        return {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else found


class StreamOptions(_Strict):
    """`continuous_usage_stats` is vLLM's: the usage so far in every chunk."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Request(_Strict):
    """What both endpoints read."""

    known: ClassVar[frozenset[str]] = frozenset()  # all that OpenAI's schema has

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}

    @property
    def stops(self) -> list[str]:
        """The stop strings, without those that are empty and stop nothing."""
        strings = [self.stop] if isinstance(self.stop, str) else self.stop
        return [text for text in strings if text]

    @property
    def bias(self) -> dict[int, float]:
        """What is added to which token's logit.

        Raises:
            Refused: a key is no token id.
        """
        if odd := [name for name in self.logit_bias if not name.isascii() or not name.isdigit()]:
            raise Refused(f"logit_bias: {odd[0]!r:.60} is no token id", status=422, param="logit_bias")
        return {int(name): value for name, value in self.logit_bias.items()}

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are shown at each; None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def most(self) -> int | None:
        """The most new tokens; None for as many as the context has room for."""
        raise NotImplementedError


class TextPart(_Strict):
    """The only kind of content that is read."""

    type: Literal["text"]
    text: str


class Called(_Strict):
    """What an earlier reply called, and with what: JSON, as it was generated."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A call in an earlier reply."""

    id: str
    type: Literal["function"]
    function: Called


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(_Strict):
    """What a template may say of a function."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


class TextFormat(_Strict):
    """The only format of an answer that is built."""

    type: Literal["text"]


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    known = frozenset({*ChatParams.__annotations__, "stream"})

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[Literal["text"]] = ["text"]
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"

    @property
    def top(self) -> int | None:
        """See `Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """See `Request`."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Request):
    """The body of `/v1/completions`."""

    known = frozenset({*TextParams.__annotations__, "stream"})

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: Literal[""] = ""

    @property
    def top(self) -> int | None:
        """See `Request`."""
        return self.logprobs

    @property
    def most(self) -> int | None:
        """See `Request`."""
        return self.max_tokens


def read(kind: type[Asked], body: bytes) -> Asked:
    """The request that a body is.

    Raises:
        Refused: it is no JSON, a field is not built or not known, or has a value that it cannot have.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"the body is no JSON object, but {found!r:.60}")
    given = {name: value for name, value in found.items() if value is not None}  # null is no wish
    for name, value in given.items():
        if name == "response_format" and isinstance(value, dict) and value.get("type") != "text":
            raise Refused(
                f"response_format of type {value.get('type')!r:.60} is not built: describe the format in a "
                "message, and leave it out",
                param=name,
            )
        if name not in kind.known | kind.model_fields.keys():
            raise Refused(f"there is no field {name!r:.60}", param=name, code="unknown_parameter")
        if name not in kind.model_fields.keys() | WITHOUT_EFFECT | {"response_format"}:
            raise Refused(f"{name} is not built: leave it out", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate({name: given[name] for name in given.keys() & kind.model_fields.keys()})
    except ValidationError as error:
        raise of_fields(error) from None
