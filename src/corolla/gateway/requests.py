"""The bodies of requests: the fields of OpenAI's API that are honoured, and a few more. Any other field is an error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "EmbeddingRequest",
    "FunctionCall",
    "JsonSchema",
    "Message",
    "NamedFunction",
    "ResponseFormat",
    "SamplingFields",
    "StreamOptions",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolFunction",
]

_MAX_STOPS = 16
_MAX_TOOLS = 128
_Text = Annotated[str, Field(min_length=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[list[_Token], Field(min_length=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    """What a stream tells besides the answer."""

    include_usage: bool | None = Field(
        default=None, description="Tell at the end how many tokens were read and written."
    )
    include_chain: bool | None = Field(
        default=None, description="Of Corolla: tell with the pieces which servers compute, and what each takes."
    )


class SamplingFields(_Fields):
    """How an answer is made: what chats and completions have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Not of OpenAI: only from so many tokens."
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = Field(default=None, description="Not of OpenAI.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(default=None, description="Not of OpenAI.")
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Is written into the gateway's log."
    )


class FunctionCall(_Fields):
    """Which function a model called, and how."""

    name: _Text
    arguments: str


class ToolCall(_Fields):
    """A call of a tool in an earlier answer."""

    id: _Text
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(_Fields):
    """A part of a message; only text is possible."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    type: Literal["text"] | None = Field(default=None, description="Means nothing; some programs send it.")

    @property
    def text(self) -> str:
        """All that it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ToolFunction(_Fields):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Fields):
    """A tool that a model may use."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(_Fields):
    """The name of a function."""

    name: _Text


class ToolChoice(_Fields):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Fields):
    """A JSON schema that the answer must fit."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Fields):
    """The form that the answer must have; it is enforced."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """A chat that the model should go on with."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(SamplingFields):
    """Texts that the model should continue."""

    prompt: (
        _Text | Annotated[list[_Text], Field(min_length=1)] | _Tokens | Annotated[list[_Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description="16 where nothing is said.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None


class EmbeddingRequest(_Fields):
    """Texts to turn into vectors."""

    model: str
    input: _Text | Annotated[list[_Text], Field(min_length=1)] | _Tokens | Annotated[list[_Tokens], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The model's own width, or an error."
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="Is written into the gateway's log."
    )
