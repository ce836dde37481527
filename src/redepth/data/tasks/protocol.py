"""What a task gives: problems as text or as ids, with each answer's difficulty and its result after every step."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from redepth.errors import RedepthError

Split = Literal["train", "held-out", "harder"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Answer:
    """One answer inside a text.

    Attributes:
        start, end: the characters `text[start:end]` that it takes, its leading space included.
        difficulty: how many steps it needs.
        results: what to say there after 0, 1, 2 … steps, up to the step from which nothing changes; the last one is right.
    """

    start: int
    end: int
    difficulty: int
    results: tuple[str, ...]

    @property
    def right(self) -> str:
        return self.results[-1]

    def after(self, step: int) -> str:
        """The intermediate result after `step` steps; the right answer once they are enough."""
        return self.results[min(step, len(self.results) - 1)]


@dataclass(frozen=True)
class TaskText:
    """One problem in words.

    Where a text asks several questions, all but the last show a question mark in place of the answer, since an answer
    that stood there would be a hint to the questions after it.
    """

    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class TaskBatch:
    """Problems as compact ids: B problems of T tokens, A answers each, S steps. All int64.

    Attributes:
        ids: `[B, T]`.
        places: `[B, A]`, the positions whose logits give the answers (they foretell the next token).
        labels: `[B, A]`, the right answers.
        step_labels: `[S, B, A]`, the intermediate results; entry i − 1 is the one after step i.
        difficulty: `[B, A]`.
    """

    ids: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    step_labels: torch.Tensor
    difficulty: torch.Tensor

    @property
    def answer_mask(self) -> torch.Tensor:
        """`[B, T]`, bool: where an answer is given."""
        return torch.zeros_like(self.ids, dtype=torch.bool).scatter(1, self.places, True)

    def at_answers(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """The entries of `[B, T, …]` at the answers, `[B, A, …]`."""
        return of_tokens[torch.arange(len(self.places), device=of_tokens.device)[:, None], self.places]


@dataclass(frozen=True)
class ScratchpadBatch:
    """Problems with their intermediate results written out, for a model that reasons in tokens.

    A row is a statement and then A segments, one for each question. Segments don't see each other; each starts at the
    same position, and is the question, the intermediate results, the answer and the end.

    Attributes:
        ids: `[B, T]`, int64.
        labels: `[B, T]`, the next token within a segment, −100 off results, answers and ends.
        position_ids: `[B, T]`.
        attention_mask: `[B, 1, T, T]`, bool, true where a token sees another.
        prompts: `[B, A, P]`, statement and question of each answer, to generate from.
        right: `[B, A]`, the right answers.
        difficulty: `[B, A]`.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompts: torch.Tensor
    right: torch.Tensor
    difficulty: torch.Tensor


@dataclass(frozen=True)
class Task(ABC):
    """A source of problems; a subclass's dataclass fields are its options, as a spec names them."""

    def check(self) -> None:  # noqa: B027
        """Raise RedepthError for options that no problem can have."""

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def name(cls) -> str:
        """As a spec says it: the built-in name, or the import path."""
        return getattr(cls, "short_name", "") or f"{cls.__module__}:{cls.__qualname__}"

    @property
    def spec(self) -> str:
        """The text that `open_task` makes the same task of."""
        chosen = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        options = "&".join(f"{name}={say_option(value)}" for name, value in chosen.items())
        return f"task:{self.name()}" + (f"?{options}" if options else "")

    @abstractmethod
    def texts(self, split: Split, count: int, seed: int = 0, questions: int = 1) -> list[TaskText]:
        """`count` problems in words, the same ones whenever the arguments are the same.

        Args:
            split: `train`, `held-out` (no problem that training can meet, as difficult) or `harder` (more difficult).
            questions: how many each problem asks.
        """

    @abstractmethod
    def scratchpads(self, split: Split, count: int, seed: int = 0) -> list[TaskText]:
        """As `texts`, with one question each, whose answer is its intermediate results written out up to the right one."""


def say_option(value: Any) -> str:
    return f"{value[0]}-{value[1]}" if isinstance(value, tuple) else str(value)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise RedepthError(f"split {split!r} is unknown; use {', '.join(SPLITS)}")
