"""What is asked of the engine, and what it gives back: sampling settings, tokens, requests."""

import itertools
from dataclasses import dataclass, field
from typing import Literal

from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy

State = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: the most tokens to add.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample from this many likeliest tokens; 0 for all.
        top_p: sample from the likeliest tokens with this mass.
        seed: of this request alone: the same seed gives the same tokens, whatever runs beside it.
        stop_ids: tokens that end the text; None for the model's own end-of-text tokens.
        logprobs: how many of the likeliest tokens to report with each token; 0 for the token's own log-probability alone,
            None for nothing.

    Raises:
        RedepthError: for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        in_range = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "seed": 0 <= self.seed < 2**64,
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        for name, fits in in_range.items():
            if not fits:
                raise RedepthError(f"{name}={getattr(self, name)!r} is out of range; see the settings of Sampling")


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: in the model's vocabulary.
        steps: how many steps of the core the pass took that chose it.
        logprob: its log-probability in nats under the model, before temperature, top_k and top_p; None unless asked for.
        top_logprobs: the likeliest tokens and theirs, likeliest first.
    """

    id: int
    steps: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """One text to continue. The engine writes to it; others read it.

    Attributes:
        prompt: token ids.
        tokens: what was added so far; with a stop token, that is the last.
        state: `waiting` for room, `running`, or `finished`.
        finish_reason: `stop` at a stop token, `length` at max_new_tokens or where the model's room ends, `cancelled`, or
            `error`.
        error: in one line, where there was one.
    """

    prompt: tuple[int, ...]
    policy: DepthPolicy
    sampling: Sampling
    number: int = field(default_factory=lambda: next(_numbers))
    tokens: list[Token] = field(default_factory=list)
    state: State = "waiting"
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @property
    def steps(self) -> int:
        """Steps of the core behind all tokens so far, the prompt's own not counted."""
        return sum(token.steps for token in self.tokens)
