"""Learning from the model that the checkpoint was made from, in addition to the text."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from redepth.checkpoint.load import load_tokenizer
from redepth.checkpoint.sources import Source, open_source, recorded_source
from redepth.errors import RedepthError
from redepth.modeling.loss import TokenLoss, cross_entropy_of_tokens

from .recipe import HealRecipe

# What families call the bound that their logits are squeezed into: Gemma 2 and 3, RecurrentGemma.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class Teacher:
    """A frozen model whose next-token distributions the student follows (Hinton et al. 2015).

    The loss of a token is (1 − mix)·CE + mix·T²·KL(teacher ‖ student), both softened by the temperature T. The teacher's
    hidden states are held for the batch; its logits only for the tokens whose loss is being computed.
    """

    def __init__(self, model: Any, mix: float, temperature: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self.mix = mix
        self.temperature = temperature
        config = model.config.get_text_config()
        self.soft_cap = next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None))), None)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    @torch.no_grad()
    def token_loss(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> TokenLoss:
        """The loss of tokens of this batch, `[B, T]`, for `chunked_cross_entropy`."""
        outputs = self.model.base_model(input_ids, position_ids=position_ids, use_cache=False)
        hidden = outputs.last_hidden_state[:, :-1].flatten(0, 1)

        def loss(logits: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                taught = F.log_softmax(self._logits(hidden[places]) / self.temperature, dim=-1)
            learnt = F.log_softmax(logits / self.temperature, dim=-1)
            divergence = F.kl_div(learnt, taught, reduction="sum", log_target=True)
            plain = cross_entropy_of_tokens(logits, targets, places)
            return (1 - self.mix) * plain + self.mix * self.temperature**2 * divergence

        return loss


def teacher_source(folder: Path, recipe: HealRecipe) -> Source:
    """The recipe's teacher, or the source that the checkpoint was converted from.

    Raises:
        RedepthError: where there is none.
    """
    source = open_source(recipe.teacher) if recipe.teacher else recorded_source(folder)
    if source is None:
        raise RedepthError(f"{folder} was not converted from a source to distil from; name one with --teacher")
    return source


def open_teacher(folder: Path, recipe: HealRecipe, vocab_size: int, dtype: torch.dtype) -> Teacher:
    """The teacher's model.

    Raises:
        RedepthError: as `teacher_source`, or where its vocabulary is another one.
    """
    source = teacher_source(folder, recipe)
    own = load_tokenizer(folder)
    differs = source.tokenizer is not None and source.tokenizer.get_vocab() != own.get_vocab()
    if differs or source.config.get_text_config().vocab_size != vocab_size:
        raise RedepthError(
            f"teacher {source.name!r} has a different vocabulary from {folder}; use one with the same tokenizer"
        )
    return Teacher(source.reference_model().to(dtype), recipe.distill, recipe.temperature)
