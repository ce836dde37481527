"""What is looked at: prompts, held-out text, or problems of a task with their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redepth.data.rows import held_out_text
from redepth.data.tasks import ArrayTask
from redepth.errors import RedepthError
from redepth.evaluation.problems import AskedTask

NOTHING = -1  # the target of a token after which nothing is expected
QUESTIONS = 4  # in each problem in words


@dataclass(frozen=True)
class Text:
    """T tokens.

    Attributes:
        ids: `[T]`.
        tokens: `[T]`, their text.
        targets: `[T]`, the token that should be foretold at each; `NOTHING` where none.
        difficulty: `[T]`, of the answer that is foretold, `NOTHING` where none; None for a text that asks nothing.
    """

    ids: list[int]
    tokens: list[str]
    targets: list[int]
    difficulty: list[int] | None = None


def next_tokens(ids: Sequence[int]) -> list[int]:
    """The targets of a text that goes on by itself."""
    return [*ids[1:], NOTHING]


def _plain(ids: list[int], tokenizer: Any) -> Text:
    return Text(ids, [tokenizer.decode([token]) for token in ids], next_tokens(ids))


def prompts(tokenizer: Any, given: Sequence[str]) -> list[Text]:
    """
    Raises:
        RedepthError: for a prompt of fewer than two tokens.
    """
    texts = [tokenizer(prompt)["input_ids"] for prompt in given]
    for prompt, ids in zip(given, texts, strict=True):
        if len(ids) < 2:
            raise RedepthError(
                f"prompt {prompt!r} has {len(ids)} tokens; give at least 2, so that one can be predicted"
            )
    return [_plain(ids, tokenizer) for ids in texts]


def held_out(tokenizer: Any, data: str, column: str, length: int, rows: int) -> list[Text]:
    """Rows of text, as `redepth calibrate` takes them."""
    return [_plain(ids, tokenizer) for ids in held_out_text(tokenizer, data, column, length, rows).tolist()]


def problems(asked: AskedTask, tokenizer: Any, vocabulary: int, count: int) -> list[Text]:
    """Held-out problems with the answers as targets, in compact ids or in words."""
    questions = QUESTIONS if isinstance(asked.task, ArrayTask) else 1
    batches = asked.batches(tokenizer, vocabulary, count, questions=questions)
    found = []
    for batch in batches:
        if batch.split != "held-out":
            continue
        for row, ids in enumerate(batch.ids.tolist()):
            own = batch.row == row
            places = batch.place[own].tolist()
            targets, difficulty = [NOTHING] * len(ids), [NOTHING] * len(ids)
            for place, label, level in zip(
                places, batch.label[own].tolist(), batch.difficulty[batch.answer[own]].tolist(), strict=True
            ):
                targets[place], difficulty[place] = label, level
            length = len(ids) if batch.attention_mask is None else int(batch.attention_mask[row].sum())
            # The words of compact ids stand apart.
            end = " " if asked.compact else ""
            tokens = [tokenizer.decode([token]) + end for token in ids[:length]]
            found.append(Text(ids[:length], tokens, targets[:length], difficulty[:length]))
    return found


def loss_and_right(logits: torch.Tensor, text: Text) -> tuple[float, int, int]:
    """Summed loss in nats on a text's targets, how many were foretold, and how many there are.

    Args:
        logits: `[T, V]`.
    """
    targets = torch.tensor(text.targets, device=logits.device)
    known = targets != NOTHING
    loss = torch.nn.functional.cross_entropy(logits[known].float(), targets[known], reduction="sum")
    return loss.item(), int((logits[known].argmax(-1) == targets[known]).sum()), int(known.sum())
