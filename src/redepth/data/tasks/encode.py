"""Task texts as a tokenizer sees them, with the labels of the answers' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redepth.errors import RedepthError

from .protocol import Answer, TaskText

IGNORED = -100  # the label that no loss counts


@dataclass(frozen=True)
class EncodedTexts:
    """B texts of at most T tokens, padded on the right; S steps. All int64.

    Labels are in step with `ids`: the label of a token is what the logits one position earlier should foretell, as
    `model(labels=…)` takes them. Where a text hides an answer, the label is the answer all the same.

    Attributes:
        ids, attention_mask: `[B, T]`.
        labels: `[B, T]`, the right answers' tokens; −100 off answers.
        step_labels: `[S, B, T]`, the intermediate results' tokens; entry i − 1 is for step i.
        difficulty: `[B, T]`, of the answer that a token is part of; −1 off answers.
        answer: `[B, T]`, the number of that answer within its text; −1 off answers.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    step_labels: torch.Tensor
    difficulty: torch.Tensor
    answer: torch.Tensor


class TextEncoder:
    """Tokenises task texts and finds the answers' tokens.

    Args:
        tokenizer: a fast one, since places of characters are needed.
        num_steps: how many steps get labels.

    Raises:
        RedepthError: for a tokenizer that is not fast.
    """

    def __init__(self, tokenizer: Any, num_steps: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RedepthError(f"{type(tokenizer).__name__} is no fast tokenizer, which tasks in text form need")
        self._tokenizer = tokenizer
        self._num_steps = num_steps
        self._known: dict[str, list[int]] = {}

    def __call__(self, problems: Sequence[TaskText]) -> EncodedTexts:
        """
        Raises:
            RedepthError: for an answer whose tokens run into the text around it, or whose intermediate results take
                another number of tokens than it does.
        """
        encoded = self._tokenizer([problem.text for problem in problems], return_offsets_mapping=True, verbose=False)
        longest = max(len(ids) for ids in encoded["input_ids"])
        pad = self._tokenizer.pad_token_id
        rows = (len(problems), longest)
        found = EncodedTexts(
            ids=torch.full(rows, pad if pad is not None else 0),
            attention_mask=torch.zeros(rows, dtype=torch.long),
            labels=torch.full(rows, IGNORED),
            step_labels=torch.full((self._num_steps, *rows), IGNORED),
            difficulty=torch.full(rows, -1),
            answer=torch.full(rows, -1),
        )
        for row, problem in enumerate(problems):
            ids, offsets = encoded["input_ids"][row], encoded["offset_mapping"][row]
            found.ids[row, : len(ids)] = torch.tensor(ids)
            found.attention_mask[row, : len(ids)] = 1
            for number, answer in enumerate(problem.answers):
                places = self._places(problem.text, answer, offsets)
                found.difficulty[row, places] = answer.difficulty
                found.answer[row, places] = number
                found.labels[row, places] = torch.tensor(self._tokens(answer, answer.right, len(places)))
                for step in range(1, self._num_steps + 1):
                    said = self._tokens(answer, answer.after(step), len(places))
                    found.step_labels[step - 1, row, places] = torch.tensor(said)
        return found

    def _places(self, text: str, answer: Answer, offsets: Sequence[tuple[int, int]]) -> list[int]:
        places = [at for at, (start, end) in enumerate(offsets) if start < answer.end and end > answer.start]
        # Some tokenizers leave the leading space out of a token's characters.
        lead = len(text[answer.start : answer.end]) - len(text[answer.start : answer.end].lstrip())
        if not places or not (
            answer.start <= offsets[places[0]][0] <= answer.start + lead and offsets[places[-1]][1] == answer.end
        ):
            raise RedepthError(
                f"answer {answer.right!r} runs into the text around it in this tokenizer; let the task end its questions otherwise"
            )
        return places

    def _tokens(self, answer: Answer, said: str, wanted: int) -> list[int]:
        """The tokens of an answer or intermediate result, as they come after other text."""
        if said not in self._known:
            before = "="
            alone = self._tokenizer(before, add_special_tokens=False)["input_ids"]
            self._known[said] = self._tokenizer(before + said, add_special_tokens=False)["input_ids"][len(alone) :]
        if len(self._known[said]) != wanted:
            raise RedepthError(
                f"result {said!r} of answer {answer.right!r} takes {len(self._known[said])} tokens where its place has "
                f"{wanted}; use a task whose results are single letters or digits"
            )
        return self._known[said]
