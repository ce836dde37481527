"""Which parameters train, and the optimiser that trains them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.fields import GROUP_MODULES

from .recipe import HealRecipe

LAYER_MATRICES = ("Wqkv", "proj", "fc", "linear_x", "linear_y", "linear_out")


def set_trainable(model: RecurrentDepthForCausalLM, recipe: HealRecipe) -> nn.Module:
    """Freeze what the recipe's `train` leaves out; with `lora`, wrap the model in PEFT's.

    Raises:
        RedepthError: for LoRA without the package peft, or on a group that has no layers.
    """
    if recipe.train == "lora":
        return _with_lora(model, recipe)
    if recipe.train != "all":
        model.requires_grad_(False)
        for part in recipe.train.split("+"):
            model.transformer[GROUP_MODULES.get(part, part)].requires_grad_(True)  # the adapter is no group
            if part == "adapter" and model.transformer.state_gate is not None:
                model.transformer.state_gate.requires_grad_(True)
    return model


def _with_lora(model: RecurrentDepthForCausalLM, recipe: HealRecipe) -> nn.Module:
    """LoRA (Hu et al. 2021) on the matrices of the chosen groups' layers, with the adapter trained in full."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RedepthError("train: lora needs the package peft; run: pip install redepth[lora]") from None
    for group in recipe.lora_groups:
        if not len(model.transformer[GROUP_MODULES[group]]):  # type: ignore[arg-type]
            raise RedepthError(f"lora_groups names {group!r}, but this model has no layers there")
    groups = "|".join(GROUP_MODULES[group] for group in recipe.lora_groups)
    settings = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        target_modules=rf"transformer\.({groups})\.\d+\.(attn|recurrence|mlp)\.({'|'.join(LAYER_MATRICES)})",
        modules_to_save=["adapter", *(["state_gate"] if model.transformer.state_gate is not None else [])],
    )
    torch.manual_seed(recipe.seed)  # of the random half of each update
    return get_peft_model(model, settings)


def without_lora(model: Any) -> RecurrentDepthForCausalLM:
    """The plain model, its low-rank updates added to the weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def trainer_optimizer_name(recipe: HealRecipe) -> str:
    """The recipe's optimiser as `TrainingArguments.optim` names it; `muon` is built by `MuonWithAdamW` instead.

    Raises:
        RedepthError: for an unknown name.
    """
    if recipe.optimizer in ("adamw", "muon"):
        return OptimizerNames.ADAMW_TORCH_FUSED.value
    known = [name.value for name in OptimizerNames]
    if recipe.optimizer not in known:
        raise RedepthError(f"optimizer {recipe.optimizer!r} is unknown; use adamw, muon, or one of {', '.join(known)}")
    return recipe.optimizer


def check_optimizer(recipe: HealRecipe, arguments: TrainingArguments, model: Any) -> None:
    """Whether Trainer can make the recipe's optimiser.

    Raises:
        RedepthError: where its package is not installed, or it wants settings that a recipe does not have.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError) as error:
        said = " ".join(str(error).split())
        raise RedepthError(f"optimizer {recipe.optimizer!r} can't be used: {said}; or use adamw or muon") from None


def set_adapter_rate(optimizer: torch.optim.Optimizer, model: RecurrentDepthForCausalLM, recipe: HealRecipe) -> None:
    """Move the adapter's parameters, and the state's gate, to a group with a rate of their own, before the first step.

    The adapter is the one matrix that no pretraining has met, so it can take larger steps (Shapiro 2026: ten times).
    """
    stack = model.transformer
    new = [stack["adapter"], *([stack.state_gate] if stack.state_gate is not None else [])]
    adapter = {parameter for part in new for parameter in part.parameters() if parameter.requires_grad}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in adapter]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in adapter]
            settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            rate = recipe.learning_rate * recipe.adapter_rate_factor
            optimizer.add_param_group({"params": moved, "lr": rate, **settings})


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases, saved as one.

    Muon takes a step along the nearest orthogonal matrix to its momentum (Jordan et al. 2024), which only makes sense
    for matrices that map hidden states to hidden states. `torch.optim` has both; this class holds their groups and
    states in one place, so that schedulers, Trainer and checkpoints see an ordinary optimiser.

    Args:
        matrices: trained by Muon, two-dimensional.
        others: trained by AdamW; `others_without_decay` as well, without weight decay.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        others_without_decay: Iterable[nn.Parameter],
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float,
        adam_beta2: float,
    ) -> None:
        adamw_groups = [
            {"params": list(others), "weight_decay": weight_decay},
            {"params": list(others_without_decay), "weight_decay": 0.0},
        ]
        self._muon = torch.optim.Muon(list(matrices), lr=muon_learning_rate, weight_decay=weight_decay)
        self._adamw = torch.optim.AdamW(adamw_groups, lr=learning_rate, betas=(0.9, adam_beta2), fused=True)
        groups = [group | {"kind": "muon"} for group in self._muon.param_groups]
        groups += [group | {"kind": "adamw"} for group in self._adamw.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let the two optimisers work on this one's groups and state."""
        for kind, optimizer in (("muon", self._muon), ("adamw", self._adamw)):
            optimizer.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        loss = self._muon.step(closure)
        self._adamw.step()
        return loss


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter maps hidden states to hidden states; embedding and head do not, nor do biases by head."""
    outside = {"wte", "lm_head"}.intersection(name.split("."))
    return parameter.ndim == 2 and not outside and not name.endswith("bias")


def muon_with_adamw(model: nn.Module, recipe: HealRecipe, decays: set[str]) -> MuonWithAdamW:
    """The composite optimiser for the model's trainable parameters; `decays` are the names that weight decay is for.

    Raises:
        RedepthError: where no matrix trains.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_inner_matrix(name, parameter):
            matrices.append(parameter)
        else:
            (others if name in decays else plain).append(parameter)
    if not matrices:
        raise RedepthError("optimizer 'muon' has no matrix to train; use adamw")
    return MuonWithAdamW(
        matrices,
        others,
        plain,
        recipe.learning_rate,
        recipe.muon_learning_rate,
        recipe.weight_decay,
        recipe.adam_beta2,
    )
