"""What a run will take, found out before it starts: tokens, FLOPs, memory, time, and whether every parameter learns."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from redepth.checkpoint.cost import count_parameters, training_flops_per_token
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.loss import TokenLoss, cross_entropy_of_tokens

from .curriculum import depth_of_step
from .distillation import Teacher
from .memory import Memory, memory_of, peak_bytes
from .recipe import HealRecipe
from .supervision import supervised_inputs, supervised_steps

MOST_DEPTHS = 20_000  # drawn beforehand, which takes a second


@dataclass(frozen=True)
class Preflight:
    """
    Attributes:
        flops: 6·[P + min(r, s)·R + k·C + max(0, r − s)·R/3] summed over the tokens, r as it will be drawn, with a loss after
            k of the steps.
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
    """(steps without, steps with gradient) of every optimiser step, as they will be drawn if no time limit ends it.

    Of a longer run, those of MOST_DEPTHS steps spread evenly over it.
    """
    number = min(recipe.max_steps, MOST_DEPTHS)
    steps = [place * recipe.max_steps // number for place in range(number)]
    return [depth_of_step(recipe, step, step / recipe.max_steps) for step in steps]


def parameters_by_part(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """(trainable, frozen) parameters of each part of the model; LoRA's own are the part `lora`."""
    parts = {"wte": "embedding", "core_block": "core", "ln_f": "norm", "lm_head": "head", "state_gate": "adapter"}
    parts |= {part: part for part in ("prelude", "adapter", "coda")}
    sums: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = "lora" if "lora_" in name else next((parts[word] for word in words if word in parts), "other")
        counts = sums[0 if parameter.requires_grad else 1]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return sums


def _pass(
    model: nn.Module,
    recipe: HealRecipe,
    batch: dict[str, Any],
    num_steps: tuple[int, int],
    teacher: Teacher | None,
    bf16: bool,
) -> float:
    """Seconds of one forward and backward pass.

    Raises:
        RedepthError: for a loss that is not finite.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    started = time.monotonic()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        token_loss: TokenLoss = cross_entropy_of_tokens
        if teacher is not None:
            token_loss = teacher.token_loss(batch["input_ids"], batch.get("position_ids"))
        loss = model(**supervised_inputs(recipe, batch, num_steps, token_loss), use_cache=False).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    if not torch.isfinite(loss):
        raise RedepthError(
            f"the first rows of training text have loss {loss.item()} after {sum(num_steps)} steps, before anything is "
            "trained; try precision fp32, or another plan or adapter"
        )
    return time.monotonic() - started


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
        measure: time passes and measure what they hold; without it one short row checks the gradients.

    Raises:
        RedepthError: for a trainable parameter that gets no gradient.
    """
    was_training = model.training
    model.train()
    depths = depths_of_run(recipe)
    deepest = max(with_gradient for _, with_gradient in depths)
    seconds = memory = None
    if measure:
        _pass(
            model, recipe, batch, (0, 1), teacher, bf16
        )  # the first pass is slower than the rest, and makes the gradients
        check_gradients(model)
        device = next(model.parameters()).device
        activations = peak_bytes(lambda: _pass(model, recipe, batch, (0, deepest), teacher, bf16), device)
        memory = memory_of(model, recipe, activations, teacher)
        shallow_seconds = _pass(model, recipe, batch, (0, 1), teacher, bf16)
        deep_seconds = _pass(model, recipe, batch, (0, deepest), teacher, bf16) if deepest > 1 else 0.0
        per_step = max(deep_seconds - shallow_seconds, 0.0) / max(deepest - 1, 1)
        micro_batches = recipe.batch_size / (len(batch["input_ids"]) * processes)
        seconds = (
            (recipe.max_steps / len(depths))
            * micro_batches
            * sum(shallow_seconds + per_step * (with_gradient - 1 + without / 3) for without, with_gradient in depths)
        )
    else:
        row = {key: value[:1, ..., :8] for key, value in batch.items()}
        _pass(model, recipe, row, (0, 1), teacher, bf16)
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
        flops=(recipe.max_steps / len(depths))
        * tokens_per_step
        * sum(
            # A step that has a loss besides the last costs one more coda.
            training_flops_per_token(count, *depth) + 6.0 * (supervised_steps(recipe, depth) - 1) * count.coda
            for depth in depths
        ),
        seconds=seconds,
        memory=memory,
        trainable=trainable,
        frozen=frozen,
        loss_before=loss_before,
    )
