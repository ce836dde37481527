"""OpenAI's protocol as redepth serves it, and what it adds: how deep each request goes, and the steps that it took.

Only what is honoured is a field. A field that is not known is refused; one of OpenAI's that redepth can't honour is
accepted at the value that asks for nothing (`NEUTRAL`); one that changes no answer is accepted and named in the answer's
`redepth.ignored` (`WITHOUT_EFFECT`).
"""

import difflib
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_serializer,
    model_validator,
)

MOST_STOPS = 4
MOST_CHOICES = 16
MOST_LOGPROBS = 20

# Fields of OpenAI's that ask for nothing at these values, and are refused at others.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")


def _with_floats(values: tuple[Any, ...]) -> list[Any]:
    """A number counts whether it is written 0 or 0.0."""
    return [*values, *(float(value) for value in values if type(value) is int)]


class Asked(BaseModel):
    """Fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    usual_tokens: ClassVar[int]  # the longest answer where no length is asked for
    continues_text: ClassVar[bool]  # whether the answer goes on in the prompt's text
    _ignored: tuple[str, ...] = PrivateAttr(())

    model: str = Field(description="Name of the served model.")
    max_tokens: int | None = Field(
        None, ge=1, description="Maximum number of new tokens; 512 in a chat and 16 in a completion by default."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the likeliest tokens with this mass.")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="How many answers; the seed of each is one higher.")
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="The same seed gives the same answer, whatever runs beside it."
    )
    stop: str | list[str] | None = Field(
        None, max_length=MOST_STOPS, description="Text at which an answer ends; it is left out."
    )
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None

    num_steps: int | None = Field(
        None, ge=1, description="Passes through the core, or with a criterion the most of them."
    )
    criterion: str | None = Field(
        None, description="Exit test by which each token leaves the loop when it has settled."
    )
    exit_threshold: float | str | None = Field(
        None, description="Of the criterion: a number, auto, or 99% as calibrated."
    )
    min_steps: int | None = Field(None, ge=1, description="With a criterion: steps that every token runs at least.")
    draft_steps: int | None = Field(None, ge=1, description="Refused: the server drafts nothing.")

    @model_validator(mode="wrap")
    @classmethod
    def _sort_out(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Take out what asks for nothing or changes nothing; the rest must be known."""
        if not isinstance(given, dict):
            return validate(given)
        for name in NEUTRAL.keys() & given.keys():
            value = given[name]
            if not any(value == neutral and type(value) is type(neutral) for neutral in _with_floats(NEUTRAL[name])):
                raise ValueError(f"{name} is not supported; leave it out")
        for name in given.keys() - cls.model_fields.keys() - NEUTRAL.keys() - set(WITHOUT_EFFECT):
            near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ValueError(f"{str(name)[:100]!r} is no field of this request; {hint}")
        known = validate({name: value for name, value in given.items() if name in cls.model_fields})
        known._ignored = tuple(name for name in WITHOUT_EFFECT if given.get(name) is not None)
        return known

    @property
    def ignored(self) -> list[str]:
        return list(self._ignored)

    def policy_keywords(self) -> dict[str, Any]:
        """What `DepthPolicy.resolve` takes, of what is given."""
        names = ("num_steps", "criterion", "exit_threshold", "min_steps", "draft_steps")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def most_likely(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each chosen one; None where no logprobs are."""
        raise NotImplementedError


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk without choices.")
    include_obfuscation: Literal[False] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What was said. Content in parts is joined."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As a chat template takes it; it knows a developer as the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        said = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return said | ({"name": self.name} if self.name is not None else {})


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    usual_tokens = 512
    continues_text = False

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().most_tokens

    @property
    def most_likely(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsked(Asked):
    """The body of /v1/completions."""

    usual_tokens = 16  # as OpenAI's
    continues_text = True

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        min_length=1, description="Text or token ids, or a list of either."
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def most_likely(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class Depth(BaseModel):
    """What redepth adds to every answer, and to the last chunk of every choice of a stream."""

    policy: str = Field(description="How the depth was chosen.")
    steps: int = Field(description="Steps that the new tokens took in all.")
    steps_per_token: float = Field(description="Their mean.")
    ignored: list[str] = Field(description="Fields of the request that changed nothing.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]
Steps = Field(description="Steps of each token of the answer; a token that ends it without text is the last of them.")


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    steps: list[int] = Steps


class Answered(BaseModel):
    """What every answer says of itself."""

    id: str
    object: str
    created: int
    model: str


class Part(Answered):
    """An answer or a chunk of one, of which only the last ones know what it came to."""

    usage: Usage | None = None
    redepth: Depth | None = None


class ChatCompletion(Answered):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    redepth: Depth


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _given(self) -> dict[str, str]:
        return {name: value for name in ("role", "content") if (value := getattr(self, name)) is not None}


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    steps: list[int]


class ChatChunk(Part):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    steps: list[int] = Steps


class Completion(Part):
    """An answer of /v1/completions, and every chunk of a stream of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["redepth"] = "redepth"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every refusal and every failure."""

    error: ErrorDetail
