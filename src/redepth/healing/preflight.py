"""What a run will be, found out before it starts: tokens, FLOPs, memory, time, and that every parameter learns."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from redepth.checkpoint.cost import count_parameters, training_flops_per_token
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.loss import LOGITS_AT_ONCE

from .curriculum import depth_of_step
from .distillation import Teacher
from .optim import is_inner_matrix
from .recipe import HealRecipe

FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one process that holds the whole model; the activations are those of its deepest micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


@dataclass(frozen=True)
class Preflight:
    """
    Attributes:
        flops: 6·[P + min(r, s)·R + C + max(0, r − s)·R/3] summed over the tokens, r as it will be drawn.
        seconds: forward and backward passes of the whole run, from a few measured ones; None where not measured.
        memory: estimated; None where not measured.
        trainable: parameters that train, by part of the model; frozen: the same for those that don't.
        loss_before: held-out loss of the untouched conversion, by number of steps.
    """

    tokens: int
    steps: int
    mean_steps: float
    flops: float
    seconds: float | None
    memory: Memory | None
    trainable: dict[str, int]
    frozen: dict[str, int]
    loss_before: dict[int, float]


def depths_of_run(recipe: HealRecipe) -> list[tuple[int, int]]:
    """(steps without, steps with gradient) of every optimiser step, as they will be drawn if no time limit ends it."""
    return [depth_of_step(recipe, step, step / recipe.max_steps) for step in range(recipe.max_steps)]


def parameters_by_part(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """(trainable, frozen) parameters of each part of the model; LoRA's own are the part `lora`."""
    parts = {"wte": "embedding", "core_block": "core", "ln_f": "norm", "lm_head": "head"}
    parts |= {part: part for part in ("prelude", "adapter", "coda")}
    sums: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = "lora" if "lora_" in name else next((parts[word] for word in words if word in parts), "other")
        counts = sums[0 if parameter.requires_grad else 1]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return sums


class _SavedBytes:
    """Counts what a forward pass keeps for the backward pass, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
        self._sizes: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tuple(sorted(tensor.shape)) not in self._weights:
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


def _pass(
    model: nn.Module, batch: dict[str, Any], num_steps: tuple[int, int], teacher: Teacher | None, bf16: bool
) -> tuple[float, int]:
    """Seconds and saved bytes of one forward and backward pass."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    saved = _SavedBytes(model)
    started = time.monotonic()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        extra: dict[str, Any] = {}
        if teacher is not None:
            extra["token_loss"] = teacher.token_loss(batch["input_ids"], batch.get("position_ids"))
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            loss = model(**batch, num_steps=num_steps, loss_only=True, use_cache=False, **extra).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started, saved.total


def check_gradients(model: nn.Module) -> None:
    """Refuse to start a run in which a trainable parameter would never learn; call it after a backward pass.

    Raises:
        RedepthError: naming the first parameter without a gradient, or that none trains.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RedepthError("no parameter trains; check the recipe's train")
    for name, parameter in trainable:
        if parameter.grad is None:
            raise RedepthError(f"parameter {name!r} is trainable but gets no gradient; freeze it or check the plan")


def preflight(
    model: nn.Module,
    config: RecurrentDepthConfig,
    recipe: HealRecipe,
    batch: dict[str, torch.Tensor],
    loss_before: dict[int, float],
    teacher: Teacher | None = None,
    bf16: bool = False,
    processes: int = 1,
    measure: bool = True,
) -> Preflight:
    """Probe the run; the model's weights stay as they are.

    Args:
        model: as it will be trained.
        batch: one micro-batch, as the loader gives it.
        measure: time passes and count what they hold; without it one short row checks the gradients.

    Raises:
        RedepthError: for a trainable parameter that gets no gradient.
    """
    was_training = model.training
    model.train()
    depths = depths_of_run(recipe)
    deepest = max(with_gradient for _, with_gradient in depths)
    seconds = memory = None
    if measure:
        _pass(model, batch, (0, 1), teacher, bf16)  # the first pass is slower than the rest
        check_gradients(model)
        shallow_seconds, shallow_bytes = _pass(model, batch, (0, 1), teacher, bf16)
        deep_seconds, deep_bytes = _pass(model, batch, (0, deepest), teacher, bf16) if deepest > 1 else (0.0, 0)
        per_step = max(deep_seconds - shallow_seconds, 0.0) / max(deepest - 1, 1)
        micro_batches = recipe.batch_size / (len(batch["input_ids"]) * processes)
        seconds = micro_batches * sum(
            shallow_seconds + per_step * (with_gradient - 1 + without / 3) for without, with_gradient in depths
        )
        memory = _memory(model, recipe, max(shallow_bytes, deep_bytes), teacher)
    else:
        row = {key: value[:1, :8] for key, value in batch.items()}
        _pass(model, row, (0, 1), teacher, bf16)
        check_gradients(model)
    model.zero_grad(set_to_none=True)
    model.train(was_training)

    count = count_parameters(config)
    tokens_per_step = recipe.batch_size * recipe.sequence_length
    trainable, frozen = parameters_by_part(model)
    return Preflight(
        tokens=recipe.max_steps * tokens_per_step,
        steps=recipe.max_steps,
        mean_steps=sum(map(sum, depths)) / len(depths),
        flops=tokens_per_step * sum(training_flops_per_token(count, *depth) for depth in depths),
        seconds=seconds,
        memory=memory,
        trainable=trainable,
        frozen=frozen,
        loss_before=loss_before,
    )


def _memory(model: nn.Module, recipe: HealRecipe, activations: int, teacher: Teacher | None) -> Memory:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = FP32_BYTES * sum(parameter.numel() for parameter in trainable)
    # AdamW keeps two moments; Muon one, for its matrices.
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and is_inner_matrix(name, p)]
    momentum_only = sum(matrix.numel() for matrix in matrices) if recipe.optimizer == "muon" else 0
    # The logits of a few tokens, their softmax and its gradient.
    logits = 3 * FP32_BYTES * LOGITS_AT_ONCE
    return Memory(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        gradients=gradients,
        optimizer=2 * gradients - FP32_BYTES * momentum_only,
        activations=activations + logits,
        teacher=sum(parameter.nbytes for parameter in teacher.model.parameters()) if teacher is not None else 0,
    )
