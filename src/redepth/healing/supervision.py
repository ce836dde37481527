"""What a training step asks of which of its steps through the core.

Known recipes, each a setting: the answer after the last step alone (Geiping et al. 2025; McLeish et al. 2025: `last`); the
answer after every step (deep supervision: Lee et al. 2015; Wang et al. 2025 for a looped core: `every-step`); each step's
own intermediate result (Shapiro 2026, recurrent-qwen-svgd: `step_targets: own-result`), which teaches the core one step of
the problem. Where every step has a label of its own, a few steps drawn anew each time are an unbiased share of all of them
at a fraction of the codas (`sampled-steps`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from redepth.data.mixture import hardest_of
from redepth.errors import RedepthError
from redepth.modeling.loss import TokenLoss, cross_entropy_of_tokens

from .recipe import HealRecipe

REMEMBERED = 0.7  # of the mean loss at the newest depth, at each optimiser step that runs it


@dataclass
class AnswerTally:
    """Summed losses of answers, `text` left out, and how many there were."""

    loss: float = 0.0
    answers: int = 0

    @property
    def mean(self) -> float | None:
        return self.loss / self.answers if self.answers else None


def supervised_steps(recipe: HealRecipe, num_steps: tuple[int, int]) -> int:
    """How many of the last steps have a loss."""
    if recipe.supervision == "last":
        return 1
    return num_steps[1] if recipe.supervision == "every-step" else min(recipe.supervised_steps, num_steps[1])


def supervised_inputs(
    recipe: HealRecipe,
    batch: dict[str, torch.Tensor],
    num_steps: tuple[int, int],
    token_loss: TokenLoss = cross_entropy_of_tokens,
    tally: AnswerTally | None = None,
) -> dict[str, Any]:
    """The arguments of `model(…, loss_only=True)` for a batch of `TrainingRows`.

    Args:
        batch: B rows of T tokens: `input_ids`, `labels` and `position_ids`, `[B, T]`, and where there are tasks `difficulty`
            `[B, T]` and `step_labels` `[B, S, T]`.
        num_steps: (steps without, steps with gradient).
        token_loss: of text.
        tally: the answers' losses are added to it.
    """
    inputs: dict[str, Any] = dict(batch)
    own, difficulty = inputs.pop("step_labels", None), inputs.pop("difficulty", None)
    steps, asked = sum(num_steps), supervised_steps(recipe, num_steps)
    numbers = range(steps - asked + 1, steps + 1)
    if recipe.step_targets == "own-result":
        assert own is not None
        labels = [own[:, min(number, own.shape[1]) - 1] for number in numbers]
    else:
        labels = [inputs["labels"]] * asked
    if asked > 1:
        inputs["step_labels"] = torch.stack(labels, 1)
        inputs["step_weights"] = [recipe.step_weight_growth**number for number in range(asked)]
    else:
        inputs["labels"] = labels[0]
    if difficulty is not None:
        token_loss = _loss_of_answers(difficulty, recipe.answer_weight, token_loss, tally)
    return inputs | {"num_steps": num_steps, "loss_only": True, "token_loss": token_loss}


def _loss_of_answers(
    difficulty: torch.Tensor, weight: float, of_text: TokenLoss, tally: AnswerTally | None
) -> TokenLoss:
    """The cross-entropy of answers, weighted, and the given loss of the rest."""
    answers = (difficulty[:, 1:] >= 0).flatten()

    def loss(logits: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        chosen = answers[places]
        found = F.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
        if tally is not None:
            tally.loss += found.item()
            tally.answers += int(chosen.sum())
        if bool(chosen.all()):
            return weight * found
        return weight * found + of_text(logits[~chosen], targets[~chosen], places[~chosen])

    return loss


def deepest_of(recipe: HealRecipe, progress: float = 1.0) -> int:
    """How many steps the hardest problems of a stretch of the run need, and `steps_beyond` more.

    Raises:
        RedepthError: where neither the stages nor the tasks tell.
    """
    limit = next((limit for end, limit in recipe.stage_ends() if progress < end - 1e-9), recipe.stage_ends()[-1][1])
    known = hardest_of(recipe)
    levels = [level for level in (limit, known) if level is not None]
    if not levels:
        raise RedepthError(
            f"depth_sampling {recipe.depth_sampling} needs tasks that tell how hard they are; {recipe.data_names} does not"
        )
    return max(min(levels), 1) + recipe.steps_beyond


class EarnedDepth:
    """The depth up to which steps are drawn, one more whenever the newest is learnt.

    Problems are hard from the start and the steps asked for grow in number: easy ones would teach the second step to leave
    what the first has found.
    """

    def __init__(self, recipe: HealRecipe) -> None:
        self._learned = recipe.learned_loss
        self._most = deepest_of(recipe)
        self.depth = 1
        self._mean: float | None = None

    def note(self, num_steps: int, loss: float | None) -> bool:
        """Take the answers' mean loss of an optimiser step; whether the depth has grown."""
        if loss is None or num_steps != self.depth:
            return False
        self._mean = loss if self._mean is None else REMEMBERED * self._mean + (1 - REMEMBERED) * loss
        if self._mean >= self._learned or self.depth == self._most:
            return False
        self.depth, self._mean = self.depth + 1, None
        return True

    def state(self) -> dict[str, Any]:
        return {"depth": self.depth, "mean": self._mean}

    def load_state(self, state: dict[str, Any]) -> None:
        self.depth, self._mean = state["depth"], state["mean"]
