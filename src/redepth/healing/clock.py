"""How far a run is, by steps or by time, what it tells about that, and when it stops."""

import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Progress:
    """One record of a run, for display.

    Attributes:
        part: `loss before`, `training` or `loss after`.
        done: share of the part, in [0, 1].
        loss: of the last optimiser step, in nats per token.
        remark: something to report once, in addition to the progress.
    """

    part: str
    done: float
    step: int = 0
    loss: float | None = None
    mean_recurrence: float | None = None
    tokens_per_second: float | None = None
    remark: str = ""


class RunClock(TrainerCallback):
    """Progress of the run in [0, 1], by steps or by time, whichever is further, and when to stop.

    All processes follow the slowest one's clock and stop together. SIGTERM ends the run after the current step, with a
    checkpoint.
    """

    def __init__(self, max_steps: int, max_minutes: float | None) -> None:
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.elapsed = 0.0
        self.step = 0
        self.terminated = False
        self._signalled = False
        self._former_handler: Any = None

    @property
    def progress(self) -> float:
        by_time = self.elapsed / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(max(self.step / self.max_steps, by_time), 1.0)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last, self.step = time.monotonic(), state.global_step
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        now = time.monotonic()
        elapsed, self._last, self.step = self.elapsed + now - self._last, now, state.global_step
        shared = torch.tensor([elapsed, float(self._signalled)], dtype=torch.float64)
        if args.world_size > 1:
            shared = shared.to(args.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        self.elapsed, self.terminated = shared[0].item(), bool(shared[1])
        if self.progress >= 1.0 or self.terminated:
            control.should_training_stop = True
        if self.terminated:
            control.should_save = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
