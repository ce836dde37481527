"""The memory that training takes: what saves some, what arithmetic gives, and the peak of a pass, which is measured."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.blocks import Block

from .distillation import Teacher
from .optim import is_inner_matrix
from .recipe import HealRecipe

FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one process that holds the whole model.

    Attributes:
        activations: the most that one micro-batch's forward and backward passes hold at once beside the rest, at the
            deepest steps that will be drawn.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


def memory_of(model: nn.Module, recipe: HealRecipe, activations: int, teacher: Teacher | None) -> Memory:
    """The memory of the run, given that of its activations."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = FP32_BYTES * sum(parameter.numel() for parameter in trainable)
    # AdamW keeps two moments; Muon one, for its matrices.
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and is_inner_matrix(name, p)]
    momentum_only = sum(matrix.numel() for matrix in matrices) if recipe.optimizer == "muon" else 0
    return Memory(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        gradients=gradients,
        optimizer=2 * gradients - FP32_BYTES * momentum_only,
        activations=activations,
        teacher=sum(parameter.nbytes for parameter in teacher.model.parameters()) if teacher is not None else 0,
    )


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors made in `work` that are alive at once, including what a checkpointed pass recomputes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operations create, for devices whose allocator does not report them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # Views, and what is written in place, lie in a storage that was there before.
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._follow(_storage(leaf), given)
        return made

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._total += self._alive[key]
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._total -= self._alive.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def use_memory_savers(model: RecurrentDepthForCausalLM, recipe: HealRecipe) -> None:
    """Switch on what the recipe asks for inside the model, before anything is measured or run."""
    model.transformer.checkpoint_steps = recipe.activation_checkpointing == "step"
    if recipe.activation_checkpointing == "layer":
        model.activation_checkpointing_enable()
    if recipe.compile:
        # Layer by layer: one compilation serves every step and depth, where the whole model would need one for each.
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
