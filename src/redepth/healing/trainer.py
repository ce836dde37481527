"""Healing on transformers' Trainer: it draws the depth of each step and keeps the schedules; the loop is theirs."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from redepth.errors import RedepthError
from redepth.evaluation.loss import loss_by_depth
from redepth.loading import load_tokenizer, read_config
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.surgery.card import write_card
from redepth.surgery.folder import HEALING_FILE, read_json, read_recipe, whole_folder, write_json, write_recipe

from .curriculum import depth_of_step, learning_rate_factor, mean_recurrence
from .data import training_and_held_out
from .memory import keep_freed_memory
from .recipe import HealRecipe

WORK_FOLDER = "healing"
BEFORE_FILE = "before.json"


@dataclass(frozen=True)
class Progress:
    """One record of a run, for whoever shows it.

    Attributes:
        part: `loss before`, `training` or `loss after`.
        done: share of the part, in [0, 1].
        loss: of the last optimiser step, in nats per token.
    """

    part: str
    done: float
    step: int = 0
    loss: float | None = None
    mean_recurrence: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Healing:
    """What a run did; kept as `healing.json` beside the weights."""

    data: str
    tokens: int
    steps: int
    minutes: float
    precision: str
    seed: int
    loss_before: dict[int, float]
    loss_after: dict[int, float]


class RunClock(TrainerCallback, ExportableState):
    """Progress of the run in [0, 1], by steps or by time, whichever is further; counts on where a resumed run left."""

    def __init__(self, max_steps: int, max_minutes: float | None, elapsed: float = 0.0) -> None:
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.elapsed = elapsed
        self._last = time.monotonic()
        self.step = 0

    def state(self) -> dict[str, Any]:
        arguments = {"max_steps": self.max_steps, "max_minutes": self.max_minutes, "elapsed": self.elapsed}
        return {"args": arguments, "attributes": {}}

    @property
    def progress(self) -> float:
        by_time = self.elapsed / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(max(self.step / self.max_steps, by_time), 1.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last, self.step = time.monotonic(), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        now = time.monotonic()
        self.elapsed, self._last, self.step = self.elapsed + now - self._last, now, state.global_step
        if self.progress >= 1.0:
            control.should_training_stop = True
        return control


class HealTrainer(Trainer):
    """Trainer with a depth for each optimiser step, and schedules that follow the run's clock."""

    def __init__(self, recipe: HealRecipe, on_progress: Callable[[Progress], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.on_progress = on_progress
        self.clock = RunClock(recipe.max_steps, recipe.max_minutes)
        self.add_callback(self.clock)
        self.remove_callback(PrinterCallback)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.clock = next(entry for entry in self.callback_handler.callbacks if isinstance(entry, RunClock))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        num_steps = depth_of_step(self.recipe, self.state.global_step, self.clock.progress)
        return super().compute_loss(model, inputs | {"num_steps": num_steps, "loss_only": True}, *args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                # The rate of the step that is about to be taken, so that the first one is not zero.
                lambda step: learning_rate_factor(
                    self.recipe, max(self.clock.progress, (step + 1) / (self.recipe.max_steps + 1))
                ),
            )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self.recipe.batch_size * self.recipe.sequence_length * self.state.global_step
            rate = tokens / self.clock.elapsed if self.clock.elapsed else None
            depth = mean_recurrence(self.recipe, self.clock.progress)
            logs = logs | {"mean_recurrence": depth}
            self.on_progress(
                Progress("training", self.clock.progress, self.state.global_step, logs["loss"], depth, rate)
            )
        super().log(logs, start_time)


def processor_has_bf16() -> bool:
    """Whether bf16 matrix products are native where the run would take place."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_gradients(model: RecurrentDepthForCausalLM, row: torch.Tensor) -> None:
    """Refuse to start a run in which a trainable parameter would never learn.

    Raises:
        RedepthError: naming the first parameter without a gradient.
    """
    model.train()
    ids = row[None].to(model.device)
    model(ids, labels=ids, num_steps=2).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise RedepthError(f"parameter {name!r} is trainable but gets no gradient; freeze it or check the plan")
    model.zero_grad(set_to_none=True)


def _training_arguments(recipe: HealRecipe, work: Path, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        logging_steps=1,
        save_steps=recipe.save_every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
    )


def _losses(
    model: RecurrentDepthForCausalLM,
    rows: torch.Tensor,
    recipe: HealRecipe,
    bf16: bool,
    part: str,
    on_progress: Callable[[Progress], None],
) -> dict[int, float]:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        return loss_by_depth(
            model,
            rows,
            recipe.eval_depths,
            recipe.micro_batch_size,
            on_row=lambda done, total: on_progress(Progress(part, done / total)),
        )


def heal(
    checkpoint: str | Path,
    recipe: HealRecipe | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Healing:
    """Train a recurrent checkpoint so that it makes use of its depth.

    Checkpoints to resume from lie in `healing/` inside the folder while the run goes on; the same call after an
    interruption goes on from the last one. At the end the healed model takes its place, written whole.

    Args:
        checkpoint: folder of a recurrent checkpoint: converted, new or published.
        recipe: the defaults of `HealRecipe` if left out.
        out: folder for the healed model, instead of healing in place.
        on_progress: called with each record of the run.

    Raises:
        RedepthError: for a checkpoint, data or recipe that does not fit.
    """
    recipe = recipe or HealRecipe()
    on_progress = on_progress or (lambda record: None)
    folder = Path(checkpoint)
    target = Path(out) if out is not None else folder
    if target != folder and target.exists():
        raise RedepthError(f"{target} already exists; give another folder for the healed model")
    config, _ = read_config(folder)
    if (folder / HEALING_FILE).exists():
        raise RedepthError(f"{folder} is healed already; convert its source again, or heal another folder")
    tokenizer = load_tokenizer(folder)
    if recipe.sequence_length > config.block_size:
        raise RedepthError(
            f"sequence_length {recipe.sequence_length} is more than the {config.block_size} tokens the model allows"
        )
    rows, held_out = training_and_held_out(
        tokenizer,
        recipe.data,
        recipe.text_column,
        recipe.validation,
        recipe.sequence_length,
        recipe.eval_rows,
        recipe.seed,
    )
    if recipe.precision == "bf16" and not processor_has_bf16():
        raise RedepthError("precision bf16 asked for, but this processor has no bf16 matrix products; use auto or fp32")
    bf16 = recipe.precision != "fp32" and processor_has_bf16()

    if not torch.cuda.is_available():
        keep_freed_memory()
    model = RecurrentDepthForCausalLM.from_pretrained(folder, dtype=torch.float32)
    work = folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    settings = recipe.model_dump(mode="json")
    begun = read_json(work / BEFORE_FILE)
    if begun is None:
        check_gradients(model, held_out[0])
        before = _losses(model, held_out, recipe, bf16, "loss before", on_progress)
        begun = {"recipe": settings, "loss_before": before}
        write_json(work / BEFORE_FILE, begun)
    elif begun["recipe"] != settings:
        raise RedepthError(
            f"{work} holds a run with another recipe; finish that one, or remove the folder to start over"
        )

    trainer = HealTrainer(
        recipe,
        on_progress,
        model=model,
        args=_training_arguments(recipe, work, bf16),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))

    healed: RecurrentDepthForCausalLM = trainer.accelerator.unwrap_model(trainer.model)
    after = _losses(healed, held_out, recipe, bf16, "loss after", on_progress)
    healing = Healing(
        data=recipe.data,
        tokens=trainer.state.global_step * recipe.batch_size * recipe.sequence_length,
        steps=trainer.state.global_step,
        minutes=trainer.clock.elapsed / 60,
        precision="bf16" if bf16 else "fp32",
        seed=recipe.seed,
        loss_before={int(depth): loss for depth, loss in begun["loss_before"].items()},
        loss_after=after,
    )
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    _save(healed, folder, target, saved, healing, recipe)
    return healing


def _save(
    model: RecurrentDepthForCausalLM,
    folder: Path,
    target: Path,
    dtype: torch.dtype,
    healing: Healing,
    recipe: HealRecipe,
) -> None:
    """Write the healed checkpoint whole: the folder's other files, new weights, records and card."""
    model.config.mean_recurrence = round(recipe.mean_recurrence)
    model.config.mean_backprop_depth = recipe.backprop_depth
    model.config.use_cache = True
    with whole_folder(target, overwrite=target == folder) as beside:
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy2(file, beside / file.name)
        model.to(dtype)  # type: ignore[arg-type]
        model.save_pretrained(beside)
        write_json(beside / HEALING_FILE, asdict(healing))
        write_recipe(beside, read_recipe(folder) | {"heal": recipe.model_dump(mode="json")})
        write_card(beside)
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
