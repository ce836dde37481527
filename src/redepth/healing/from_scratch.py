"""Small models trained from scratch on a task: what the loop learns where each step has its own label.

The loss of `every-step` asks for the intermediate result after i steps at step i (as Shapiro 2026 does in
recurrent-qwen-svgd). To save time it asks at a few steps in a row only, drawn anew at each update: the steps before them
run without gradient, since every one of them has a label of its own to learn from at another update.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from redepth.checkpoint.cost import count_parameters, training_flops_per_token
from redepth.checkpoint.folder import CheckpointFolder, write_recipe
from redepth.data.tasks import IGNORED, ArrayTask, TaskBatch
from redepth.data.tasks.arrays import END
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.modeling.policy import sample_num_steps

from .optim import MuonWithAdamW, is_inner_matrix

Supervision = Literal["every-step", "last", "scratchpad"]
LEARNED = 0.25  # nats: below this mean loss the curriculum adds one more step
REMEMBERED = 0.8  # of the mean loss, at each update
WEIGHT_DECAY = 0.01
ADAM_BETA2 = 0.999
WARM_UP, DECAY = 50, 0.5  # updates, and the share of the run in which the rates fall
ALL_STEPS = 64  # at most so many steps carry a gradient under `last`


@dataclass(frozen=True)
class TaskTraining:
    """How a small model is trained.

    Attributes:
        supervision: `every-step`, each step asks for its own intermediate result; `last`, the answer after the last
            step; `scratchpad`, intermediate results are written out as tokens.
        num_steps: r under `last` and `scratchpad`; 0 to draw it anew at each update (mean: the deepest answer's). Under
            `every-step` how many steps are asked for in the end; 0 for those of the deepest answer and `beyond` more.
        updates: of the optimiser.
        seconds: end after this time if that comes first; schedules then run on time.
        learning_rate, muon_learning_rate: of embeddings and head, and of the matrices inside the layers.
        window: supervised steps in a row, at each update.
        beyond: how many steps beyond the deepest answer get a label too, so that more steps don't hurt.
        ramp: share of the run until the deepest answers are asked; under `every-step` the loss decides instead.
    """

    supervision: Supervision = "every-step"
    num_steps: int = 0
    updates: int = 1000
    seconds: float | None = None
    batch_size: int = 64
    learning_rate: float = 5e-3
    muon_learning_rate: float = 0.02
    window: int = 2
    beyond: int = 2
    ramp: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_size, self.window) < 1:
            raise RedepthError(
                f"updates={self.updates}, batch_size={self.batch_size} and window={self.window} must be at least 1"
            )
        if self.supervision == "scratchpad" and self.num_steps < 1:
            raise RedepthError(
                f"num_steps={self.num_steps} must be at least 1 where intermediate results are written out"
            )
        if self.supervision == "every-step" and 0 < self.num_steps < self.window:
            raise RedepthError(f"num_steps={self.num_steps} must be at least window={self.window}")


@dataclass(frozen=True)
class TrainingRecord:
    """
    Attributes:
        tokens: that the layers read, answers asked for in one pass or several counted once.
        flops: of the layers, as `checkpoint.cost` counts them.
        most_steps: the deepest r that training ran.
    """

    updates: int
    seconds: float
    tokens: int
    flops: float
    loss: float
    most_steps: int


def task_config(
    task: ArrayTask, width: int = 64, layers: tuple[int, int, int] = (1, 1, 0), num_steps: int = 8
) -> RecurrentDepthConfig:
    """A small recurrent model for a task's compact ids; `layers` are those of prelude, core and coda."""
    return RecurrentDepthConfig(
        vocab_size=len(task.words),
        n_embd=width,
        n_heads=4,
        intermediate_size=3 * width,
        n_layers_in_prelude=layers[0],
        n_layers_in_recurrent_block=layers[1],
        n_layers_in_coda=layers[2],
        block_size=1024,
        norm_placement="pre",
        norm_before_coda=False,
        qk_bias=False,
        rope_base=10_000.0,
        # The prelude reads its neighbours by their places; most cores look things up by what they are.
        rope_layers=[layer < layers[0] or task.core_reads_places for layer in range(sum(layers))],
        initial_state_mode="embed",
        tie_embeddings=False,
        mean_recurrence=num_steps,
        eos_token_id=task.end_id,
    )


def train_on_task(
    task: ArrayTask,
    config: RecurrentDepthConfig,
    training: TaskTraining,
    on_update: Callable[[float, str], None] | None = None,
) -> tuple[RecurrentDepthForCausalLM, TrainingRecord]:
    """A fresh model, trained on a task's split `train`.

    Args:
        on_update: called with the share that is done, and a note.
    """
    torch.manual_seed(training.seed)
    model = RecurrentDepthForCausalLM(config).train()
    optimizer = _optimizer(model, training)
    full_rates = [group["lr"] for group in optimizer.param_groups]
    draws = torch.Generator().manual_seed(training.seed)
    count = count_parameters(config)
    least, most = task.depth
    # Under `every-step` problems are long from the start, and the steps that are asked for grow in number: short
    # problems
    # would teach the second step to leave what the first has found.
    longest, reach = (most, training.window) if training.supervision == "every-step" else (min(max(least, 1), most), 0)
    deepest = training.num_steps or most + training.beyond
    started, update, tokens, flops, mean_loss, most_steps = time.monotonic(), 0, 0, 0.0, None, 0
    while True:
        done = update / training.updates
        if training.seconds is not None:
            done = max(done, (time.monotonic() - started) / training.seconds)
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = rate * min(1, (update + 1) / WARM_UP) * min(1, (1 - done) / DECAY + 0.02)
        if training.supervision != "every-step":
            longest = min(most, max(longest, 1 + int(most * done / training.ramp)))
        batch_seed = training.seed * 1_000_003 + update
        work = _ask(model, task, training, batch_seed, (min(least, longest), longest), reach, draws)
        work.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update += 1
        tokens += work.tokens
        per_token = training_flops_per_token(count, work.before, work.steps) + 6.0 * (work.leaves - 1) * count.coda
        flops += work.tokens * per_token
        most_steps = max(most_steps, work.before + work.steps)
        value = work.loss.item()
        mean_loss = value if mean_loss is None else REMEMBERED * mean_loss + (1 - REMEMBERED) * value
        if training.supervision == "every-step" and mean_loss < LEARNED and reach < deepest:
            reach, mean_loss = reach + 1, None
        progress = f"{reach} steps" if training.supervision == "every-step" else f"depth up to {longest}"
        if on_update is not None:
            on_update(done, f"update {update}, {progress}, loss {value:.3f}")
    seconds = time.monotonic() - started
    return model.eval(), TrainingRecord(update, seconds, tokens, flops, mean_loss or 0.0, most_steps)


def _optimizer(model: RecurrentDepthForCausalLM, training: TaskTraining) -> MuonWithAdamW:
    """Muon learns to look a second link up within 100 updates here, where AdamW alone needs more than 500."""
    inner: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inner if is_inner_matrix(name, parameter) else outer).append(parameter)
    return MuonWithAdamW(
        inner, outer, [], training.learning_rate, training.muon_learning_rate, WEIGHT_DECAY, ADAM_BETA2
    )


@dataclass(frozen=True)
class _Work:
    """One update's loss and what it took: steps without and with gradient, and how many of them left through the coda."""

    loss: torch.Tensor
    tokens: int
    before: int
    steps: int
    leaves: int = 1


def _ask(
    model: RecurrentDepthForCausalLM,
    task: ArrayTask,
    training: TaskTraining,
    seed: int,
    depth: tuple[int, int],
    reach: int,
    draws: torch.Generator,
) -> _Work:
    """The loss of one batch of problems of these difficulties; under `every-step` at steps up to `reach`."""
    if training.supervision == "scratchpad":
        written = task.scratchpad_batch("train", training.batch_size, seed, depth)
        logits = model(
            written.ids,
            attention_mask=written.attention_mask,
            position_ids=written.position_ids,
            num_steps=training.num_steps,
            use_cache=False,
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), written.labels.flatten(), ignore_index=IGNORED)
        return _Work(loss, written.ids.numel(), 0, training.num_steps)
    every_step = training.supervision == "every-step"
    if every_step:
        before = int(torch.randint(0, reach - training.window + 1, (), generator=draws))
        steps = training.window
    elif training.num_steps:
        before, steps = 0, training.num_steps
    else:
        before, steps = sample_num_steps(task.depth[1], ALL_STEPS, draws)
    batch = task.batch("train", training.batch_size, seed, before + steps, depth)
    loss = _loss_of_steps(model, batch, before, steps, every_step)
    return _Work(loss, batch.ids.numel(), before, steps, steps if every_step else 1)


def _loss_of_steps(
    model: RecurrentDepthForCausalLM, batch: TaskBatch, before: int, steps: int, every_step: bool
) -> torch.Tensor:
    """Mean cross-entropy at the answers: after each of the last `steps` steps its own label, or after the last the answer."""
    embedded, _ = model.embed_inputs(batch.ids)
    state = model.initialize_state(embedded)
    with torch.no_grad():
        for step in range(before):
            state, _, _ = model.iterate_one_step(embedded, state, current_step=step)
    losses = []
    for step in range(before, before + steps):
        state, _, _ = model.iterate_one_step(embedded, state, current_step=step)
        if every_step or step == before + steps - 1:
            logits = model.predict_from_latents(state).logits
            assert logits is not None
            labels = batch.step_labels[step] if every_step else batch.labels
            losses.append(F.cross_entropy(batch.at_answers(logits).flatten(0, 1), labels.flatten()))
    return torch.stack(losses).mean()


def word_tokenizer(task: ArrayTask) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the task's compact words, with spaces between them."""
    words = {word: number for number, word in enumerate(task.words)}
    core = Tokenizer(models.WordLevel(words, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END, unk_token=END)


def save_task_model(
    model: RecurrentDepthForCausalLM,
    task: ArrayTask,
    training: TaskTraining,
    record: TrainingRecord,
    out: str | Path,
    overwrite: bool = False,
) -> Path:
    """A checkpoint with a tokenizer of the task's words and the record of task and training.

    Raises:
        RedepthError: if `out` exists and `overwrite` is off.
    """
    with CheckpointFolder(out).replacing(overwrite) as folder:
        model.save_pretrained(folder)
        word_tokenizer(task).save_pretrained(folder)
        made: dict[str, Any] = {"task": task.spec, **asdict(training), **asdict(record)}
        write_recipe(folder, {"train_on_task": made})
    return Path(out)


def require_array_task(task: object, spec: str) -> ArrayTask:
    """The task, if it has compact ids.

    Raises:
        RedepthError: if it exists only as text.
    """
    if not isinstance(task, ArrayTask):
        raise RedepthError(f"{spec!r} has no compact ids, which a small model needs; use a task of redepth's own")
    return task
