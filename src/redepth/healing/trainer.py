"""Healing on transformers' Trainer: the depth of each step, schedules, exact resume; the loop is theirs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils import CONFIG_NAME

from redepth.checkpoint.folder import read_json
from redepth.data.mixture import TrainingRows
from redepth.errors import RedepthError, first_line
from redepth.evaluation.loss import loss_by_depth
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.loss import TokenLoss, cross_entropy_of_tokens

from .checkpoints import RUN_FILE, seal
from .clock import Progress, RunClock
from .curriculum import depth_of_step, learning_rate_factor, mean_depth
from .distillation import Teacher
from .guard import SpikeGuard
from .optim import muon_with_adamw, set_adapter_rate, trainer_optimizer_name, without_lora
from .recipe import HealRecipe
from .supervision import AnswerTally, EarnedDepth, supervised_inputs


class HealTrainer(Trainer):
    """Trainer with a depth for each optimiser step, and schedules that follow the run's clock.

    Args:
        held_out: rows `[rows, tokens]` for the losses during the run.
    """

    train_dataset: TrainingRows

    def __init__(
        self,
        recipe: HealRecipe,
        on_progress: Callable[[Progress], None],
        held_out: torch.Tensor,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.on_progress = on_progress
        self.held_out = held_out
        self.teacher = teacher
        self.clock = RunClock(recipe.max_steps, recipe.max_minutes)
        self.guard = SpikeGuard(recipe.spike_factor, recipe.max_skipped)
        self.add_callback(self.clock)
        self.add_callback(_HeldOutLosses(recipe.eval_every))
        self.remove_callback(PrinterCallback)
        self.earned = EarnedDepth(recipe) if recipe.depth_sampling == "earned" else None
        self._answers = AnswerTally()
        self._micro_step = 0
        self._step_loss = 0.0

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from the start or from a whole checkpoint."""
        if checkpoint is None:
            self.train()
            return
        state = read_json(checkpoint / RUN_FILE)
        assert state is not None
        self.clock.elapsed = state["elapsed"]
        self.guard.load_state(state["guard"])
        if self.earned is not None:
            self.earned.load_state(state["earned"])
        self.train_dataset.go_to(state["data"])
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.clock.step = self.state.global_step
        if self.clock.progress < 1:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # the training is done, and only what follows it is left
            self._load_from_checkpoint(str(checkpoint))

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self._micro_step += 1
        self._step_loss += loss.item()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        token_loss: TokenLoss = cross_entropy_of_tokens
        if self.teacher is not None:
            token_loss = self.teacher.token_loss(inputs["input_ids"], inputs.get("position_ids"))
        inputs = supervised_inputs(self.recipe, inputs, self._depth(), token_loss, self._answers)
        if self.plain_model().config.initial_state_mode == "noise":
            inputs["input_states"] = self._noise_states(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _depth(self) -> tuple[int, int]:
        """(steps without, steps with gradient) of the optimiser step in hand."""
        return depth_of_step(self.recipe, self.state.global_step, self.clock.progress, self._earned_depth())

    def _earned_depth(self) -> int | None:
        return self.earned.depth if self.earned is not None else None

    def _noise_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """s_0 `[B, T, D]`, fresh at every step, for each row by its place in the run's batch.

        So it is the same for any number of processes and any size of micro-batch, and after a resume.
        """
        rows, tokens = input_ids.shape
        first = (self._micro_step * self.args.world_size + self.args.process_index) * rows
        row = torch.arange(first, first + rows, device=input_ids.device)
        places = row[:, None] * tokens + torch.arange(tokens, device=input_ids.device)
        model = self.plain_model()
        like = torch.empty(rows, tokens, model.config.n_embd, device=input_ids.device)
        return model.initialize_state(like, places, self.recipe.seed_of(self.state.global_step))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, and drop the gradients of a step that the guard refuses, so that the optimiser leaves it out."""
        norm = super()._clip_grad_norm(model)
        whole_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        loss = torch.tensor(self._step_loss, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.args.world_size
        self._micro_step, self._step_loss = 0, 0.0
        self._note_answers()
        step = self.state.global_step + 1
        trouble = self.guard.judge(step, loss.item(), whole_norm.item())
        if trouble is not None:
            model.zero_grad(set_to_none=True)
            self.say(f"step {step} is skipped, its {trouble}")
        return norm

    def _note_answers(self) -> None:
        """Let the depth grow by what all processes' answers of this step have cost."""
        answers, self._answers = self._answers, AnswerTally()
        if self.earned is None:
            return
        if self.args.world_size > 1:
            sums = torch.tensor([answers.loss, answers.answers], dtype=torch.float64, device=self.args.device)
            torch.distributed.all_reduce(sums)
            answers = AnswerTally(sums[0].item(), int(sums[1]))
        if self.earned.note(sum(self._depth()), answers.mean):
            self.say(f"step {self.state.global_step + 1}, {self.earned.depth} steps from here on")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.recipe.optimizer == "muon" and self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = muon_with_adamw(trained, self.recipe, set(self.get_decay_parameter_names(trained)))
        optimizer = super().create_optimizer(model)
        if self.recipe.adapter_rate_factor != 1:
            set_adapter_rate(optimizer, self.plain_model(), self.recipe)
        return optimizer

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # libraries report a full disk in many ways
            shutil.rmtree(folder, ignore_errors=True)
            raise RedepthError(
                f"{folder} could not be written: {first_line(error)}; free some space, then run the same command again to resume"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # Trainer reads it back as a bare PreTrainedConfig, which rejects llama3's rope settings; the model has its
            # own.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            state = {
                "elapsed": self.clock.elapsed,
                "guard": self.guard.state(),
                "earned": self.earned.state() if self.earned is not None else None,
                "data": self.train_dataset.position(self.state.global_step * self.recipe.batch_size),
            }
            seal(folder, state)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        losses = self.held_out_losses()
        told = ", ".join(f"{loss:.3f} at r = {depth}" for depth, loss in losses.items())
        self.say(f"step {self.state.global_step}, held-out loss: {told}")
        metrics = {f"held_out_loss_r{depth}": loss for depth, loss in losses.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_losses(self, on_row: Callable[[int, int], None] | None = None) -> dict[int, float]:
        """Loss on the held-out rows after each of the recipe's `eval_depths`."""
        model = self.plain_model()
        if isinstance(model, FSDPModule):
            # Sharded weights are gathered for forward() alone unless told otherwise.
            for step_call in ("embed_inputs", "iterate_one_step", "predict_from_latents"):
                register_fsdp_forward_method(model, step_call)
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            return loss_by_depth(
                model,
                self.held_out,
                self.recipe.eval_depths,
                self.recipe.micro_batch_size,
                on_row=on_row,
                labels=self.train_dataset.held_out_labels,
            )

    def plain_model(self) -> RecurrentDepthForCausalLM:
        """The recurrent model itself, inside what PEFT and accelerate wrapped around it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def whole_model(self) -> RecurrentDepthForCausalLM:
        """The trained model with all its weights, LoRA merged into them. Every process must call it."""
        if not self.is_fsdp_enabled:
            return without_lora(self.accelerator.unwrap_model(self.model))
        weights = get_model_state_dict(
            self.accelerator.unwrap_model(self.model),
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )
        model = RecurrentDepthForCausalLM(self.plain_model().config)
        if self.args.should_save:  # the other processes receive nothing
            model.load_state_dict(weights)
        return model

    def say(self, remark: str) -> None:
        self.on_progress(Progress("training", self.clock.progress, self.state.global_step, remark=remark))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            tokens = self.recipe.batch_size * self.recipe.sequence_length * self.state.global_step
            rate = tokens / self.clock.elapsed if self.clock.elapsed else None
            depth = mean_depth(self.recipe, self.clock.progress, self._earned_depth())
            logs = logs | {"mean_recurrence": depth}
            self.on_progress(
                Progress("training", self.clock.progress, self.state.global_step, logs["loss"], depth, rate)
            )
        super().log(logs, start_time)


class _HeldOutLosses(TrainerCallback):
    """Asks for the held-out losses every so many steps."""

    def __init__(self, every: int | None) -> None:
        self.every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.every is not None and state.global_step % self.every == 0:
            control.should_evaluate = True
        return control


def training_arguments(recipe: HealRecipe, work: Path, bf16: bool) -> TrainingArguments:
    """Trainer's settings for a recipe, with the batch shared out among the processes.

    Raises:
        RedepthError: where the processes can't share the batch evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size % processes:
        raise RedepthError(f"batch_size {recipe.batch_size} can't be shared evenly by {processes} processes")
    rows = recipe.batch_size // processes
    at_once = next(size for size in range(min(recipe.micro_batch_size, rows), 0, -1) if rows % size == 0)
    trackers: Any = [name.strip() for name in recipe.report_to.split(",")]
    if recipe.report_to == "auto":
        trackers = ["tensorboard"] if is_tensorboard_available() else "none"
    try:
        return TrainingArguments(
            output_dir=str(work),
            max_steps=recipe.max_steps,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=rows // at_once,
            learning_rate=recipe.learning_rate,
            adam_beta2=recipe.adam_beta2,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            optim=trainer_optimizer_name(recipe),
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_steps=recipe.save_every,
            save_total_limit=2,
            # The rows know where to resume.
            ignore_data_skip=True,
            report_to=trackers,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            seed=recipe.seed,
        )
    except ImportError as error:
        raise RedepthError(f"healing recipe: {' '.join(str(error).split())}") from None
