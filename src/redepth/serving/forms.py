"""Answers in the protocol's form, whole or in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import protocol
from .answers import Answer, Piece
from .request import Token
from .stops import UNFINISHED


def depth_of(answers: Sequence[Answer], ignored: Sequence[str]) -> protocol.Depth:
    """The steps behind some answers, which share a policy."""
    steps = [taken for answer in answers for taken in answer.steps]
    return protocol.Depth(
        policy=str(answers[0].policy),
        steps=sum(steps),
        steps_per_token=round(sum(steps) / max(len(steps), 1), 4),
        ignored=list(ignored),
    )


@dataclass
class Form:
    """How one request's answers are said.

    Attributes:
        answers: by index; they grow while the form is in use.
        prompt_tokens: of all prompts, each counted once.
    """

    model: str
    tokenizer: Any
    answers: list[Answer]
    ignored: list[str]
    prompt_tokens: int
    most_likely: int | None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""
    prefix = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._lengths = [0] * len(self.answers)
        self._letter = self.tokenizer("a", add_special_tokens=False)["input_ids"]

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model}

    def usage(self) -> protocol.Usage:
        new = sum(len(answer.tokens) for answer in self.answers)
        return protocol.Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=new, total_tokens=self.prompt_tokens + new
        )

    def depth(self, number: int | None = None) -> protocol.Depth:
        """Of one answer, or of all."""
        return depth_of(self.answers if number is None else [self.answers[number]], self.ignored)

    def opening(self) -> list[Any]:
        """Chunks before the first piece."""
        return []

    def chunk(self, number: int, piece: Piece) -> Any:
        raise NotImplementedError

    def last_usage(self) -> Any:
        """The chunk that a request gets for `include_usage`."""
        raise NotImplementedError

    def whole(self) -> Any:
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """What a token adds to a text; its space is part of it, which some tokenizers drop at the beginning."""
        return self.tokenizer.decode([*self._letter, token])[len(self.tokenizer.decode(self._letter)) :]

    def _steps(self, tokens: Sequence[Token]) -> list[int]:
        return [token.steps for token in tokens]


class ChatForm(Form):
    prefix = "chatcmpl"

    def opening(self) -> list[Any]:
        return [
            self._chunk(
                protocol.ChatChunkChoice(index=number, delta=protocol.Delta(role="assistant", content=""), steps=[])
            )
            for number in range(len(self.answers))
        ]

    def chunk(self, number: int, piece: Piece) -> protocol.ChatChunk:
        choice = protocol.ChatChunkChoice(
            index=number,
            delta=protocol.Delta(content=piece.text) if piece.text else protocol.Delta(),
            logprobs=self._logprobs(piece.tokens),
            finish_reason=piece.finish,
            steps=self._steps(piece.tokens),
        )
        return self._chunk(choice, redepth=self.depth(number) if piece.finish is not None else None)

    def _chunk(self, *choices: protocol.ChatChunkChoice, **more: Any) -> protocol.ChatChunk:
        return protocol.ChatChunk(**self._head, choices=list(choices), **more)

    def last_usage(self) -> protocol.ChatChunk:
        return self._chunk(usage=self.usage(), redepth=self.depth())

    def whole(self) -> protocol.ChatCompletion:
        choices = [
            protocol.ChatChoice(
                index=number,
                message=protocol.Said(content=answer.text.text),
                logprobs=self._logprobs(answer.tokens),
                finish_reason=answer.finish,
                steps=answer.steps,
            )
            for number, answer in enumerate(self.answers)
        ]
        return protocol.ChatCompletion(**self._head, choices=choices, usage=self.usage(), redepth=self.depth())

    def _logprobs(self, tokens: Sequence[Token]) -> protocol.ChatLogprobs | None:
        if self.most_likely is None:
            return None
        return protocol.ChatLogprobs(
            content=[
                protocol.TokenLogprob(
                    **self._named(token.id, token.logprob),
                    top_logprobs=[protocol.TopLogprob(**self._named(*likely)) for likely in token.top_logprobs],
                )
                for token in tokens
            ]
        )

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        # Of a part of a character the decoder shows no bytes.
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if UNFINISHED in text else list(text.encode()),
        }


class CompletionForm(Form):
    prefix = "cmpl"

    def chunk(self, number: int, piece: Piece) -> protocol.Completion:
        depth = self.depth(number) if piece.finish is not None else None
        return protocol.Completion(**self._head, choices=[self._choice(number, piece)], redepth=depth)

    def last_usage(self) -> protocol.Completion:
        return protocol.Completion(**self._head, choices=[], usage=self.usage(), redepth=self.depth())

    def whole(self) -> protocol.Completion:
        choices = [
            self._choice(number, Piece(answer.text.text, tuple(answer.tokens), answer.finish))
            for number, answer in enumerate(self.answers)
        ]
        return protocol.Completion(**self._head, choices=choices, usage=self.usage(), redepth=self.depth())

    def _choice(self, number: int, piece: Piece) -> protocol.CompletionChoice:
        return protocol.CompletionChoice(
            index=number,
            text=piece.text,
            logprobs=self._logprobs(number, piece.tokens),
            finish_reason=piece.finish,
            steps=self._steps(piece.tokens),
        )

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> protocol.CompletionLogprobs | None:
        if self.most_likely is None:
            return None
        texts = [self.token_text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._lengths[number])
            self._lengths[number] += len(text)
        top = [{self.token_text(each): value for each, value in token.top_logprobs} for token in tokens]
        return protocol.CompletionLogprobs(
            tokens=texts,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=top if self.most_likely else None,
            text_offset=offsets,
        )
