"""One text under the microscope: every state, what coda and head make of it, where it would have exited, what it read.

Shapes: T tokens of the text, R steps, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from redepth.errors import RedepthError
from redepth.evaluation.calibrate import exit_steps
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.exits import EXIT_TESTS
from redepth.modeling.fields import LRU_LAYER
from redepth.modeling.state import position_noise

from .contraction import Stretch, largest_stretch
from .dynamics import (
    FEWEST_STEPS,
    Endings,
    classify_endings,
    distance_to_last,
    distance_to_next,
    principal_components,
    settling_step,
    spread_over_starts,
)
from .record import record
from .texts import NOTHING, Text
from .watch import ATTENTION_MAP, STATE, WITH_A_MAP

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]

# Likeliest tokens that are kept at every step.
TOP = 5
# Noise states, of the embedded input's size, that path independence starts from, beside zeros and the embedded input.
NOISE_STARTS = 2
STRETCH_ITERATIONS = 30
STRETCH_TOLERANCE = 0.01


@dataclass(frozen=True)
class Predictions:
    """What coda and head make of the states s_1 … s_R.

    Attributes:
        top: `[T, R, TOP]`, the likeliest tokens' ids, likeliest first.
        probability: `[T, R, TOP]`, theirs.
        entropy: `[T, R]`, in nats.
        kl_to_last: `[T, R]`, KL(p_R ‖ p_i) in nats.
        loss: `[T, R]`, −log p of the token that should follow, in nats; NaN where none should.
        exits: by exit test, `[T]`, the step after which its default threshold lets the token go.
    """

    top: Integers
    probability: Floats
    entropy: Floats
    kl_to_last: Floats
    loss: Floats
    exits: dict[str, Integers]

    @property
    def flips(self) -> npt.NDArray[np.bool_]:
        """`[T, R]`, where the likeliest token is another than one step before; never at step 1."""
        picks = self.top[..., 0]
        return np.concatenate([np.zeros_like(picks[:, :1], dtype=bool), picks[:, 1:] != picks[:, :-1]], axis=1)

    @property
    def final_from(self) -> Integers:
        """`[T]`, the step from which on the likeliest token is the last step's."""
        other = self.top[..., 0] != self.top[:, -1:, 0]
        return np.where(other.any(1), other.shape[1] - np.argmax(other[:, ::-1], axis=1), 0) + 1


@dataclass(frozen=True)
class Course:
    """What the loop made of one text.

    Attributes:
        text: what was run.
        to_last, to_next: `[T, R + 1]` and `[T, R]`, see `dynamics`.
        settled: `[T]`, see `dynamics.settling_step`.
        endings: of each token.
        plane, plane_share: `[T, R + 1, 2]` and `[T]`, each trajectory in its own two principal components, and the share
            of its variance that they explain.
        predictions: by step.
        spread: `[T, R + 1]`, see `dynamics.spread_over_starts`.
        attention: `[core layers with attention, R, T]`, what the last token read, averaged over heads.
        attention_layers: their numbers in the whole stack.
    """

    text: Text
    to_last: Floats
    to_next: Floats
    settled: Integers
    endings: Endings
    plane: Floats
    plane_share: Floats
    predictions: Predictions
    spread: Floats
    attention: Floats
    attention_layers: list[int]

    @property
    def targets(self) -> Integers:
        """`[T]`, the tokens that should be foretold; `NOTHING` where none."""
        return np.asarray(self.text.targets)

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """`[T]`, the tokens whose predictions count: where a task's answers are foretold, or all of a text."""
        return np.ones(len(self.text.ids), dtype=bool) if self.text.difficulty is None else self.targets != NOTHING

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """`[T, R]`, where the likeliest token is the one that should be foretold."""
        return self.predictions.top[..., 0] == self.targets[:, None]


def check_depth(num_steps: int) -> None:
    """Raises RedepthError for fewer steps than an ending can be told from."""
    if num_steps < FEWEST_STEPS - 1:
        raise RedepthError(
            f"num_steps {num_steps} is too few to see what the state does; give at least {FEWEST_STEPS - 1}"
        )


@torch.no_grad()
def measure_course(model: RecurrentDepthForCausalLM, text: Text, num_steps: int) -> Course:
    """Run one text of at least 2 tokens `num_steps` deep and look at it from every side.

    Raises:
        RedepthError: for too few tokens or steps, and more tokens than the model allows.
    """
    check_depth(num_steps)
    ids = text.ids
    if len(ids) < 2:
        raise RedepthError(f"a text of {len(ids)} tokens predicts nothing; give at least 2")
    if len(ids) > model.config.block_size:
        raise RedepthError(f"a text of {len(ids)} tokens is more than the {model.config.block_size} this model allows")
    row = torch.tensor([ids], device=model.device)
    layers = attention_layers(model)
    parts = (STATE, ATTENTION_MAP) if layers else (STATE,)
    with record(model, parts=parts) as seen:
        model(row, num_steps=num_steps, use_cache=False, logits_to_keep=1)
    states = seen.trajectory()
    last_reads = [
        [seen.get(ATTENTION_MAP, step, layer)[-1].float().mean(0).cpu().numpy() for step in range(1, num_steps + 1)]
        for layer in layers
    ]
    del seen
    plane, share = principal_components(states, 2, per_token=True)
    return Course(
        text=text,
        to_last=distance_to_last(states),
        to_next=distance_to_next(states),
        settled=settling_step(states),
        endings=classify_endings(states),
        plane=plane,
        plane_share=share.sum(1),
        predictions=predictions_by_step(model, row, states, torch.tensor(text.targets)),
        spread=spread_over_starts(torch.stack(list(runs_from_starts(model, row, num_steps)))),
        attention=np.asarray(last_reads).reshape(len(layers), num_steps, len(ids)),
        attention_layers=layers,
    )


def attention_layers(model: RecurrentDepthForCausalLM) -> list[int]:
    """The core's layers whose attention can be recorded, counted over the whole stack."""
    config = model.config
    if config._attn_implementation not in WITH_A_MAP:
        return []
    first = config.n_layers_in_prelude
    core = range(first, first + config.n_layers_in_recurrent_block)
    return [layer for layer in core if config.layer_type(layer) != LRU_LAYER]


@torch.no_grad()
def predictions_by_step(
    model: RecurrentDepthForCausalLM, row: torch.Tensor, states: torch.Tensor, targets: torch.Tensor
) -> Predictions:
    """Leave the loop through coda and head after every step.

    Args:
        row: ids `[1, T]`.
        states: `[T, R + 1, D]`, the initial state first.
        targets: `[T]`, what should be foretold, or `NOTHING`.
    """
    stack = model.transformer
    context = stack.context(stack.embed(row))

    def read(step: int) -> torch.Tensor:
        return model.read_logits(states[None, :, step], context)[0].float()

    num_steps = states.shape[1] - 1
    last = F.log_softmax(read(num_steps), dim=-1)
    targets = targets.to(row.device)
    expected = targets != NOTHING
    kept: dict[str, list[torch.Tensor]] = {"top": [], "probability": [], "entropy": [], "kl": [], "loss": []}
    courses: dict[str, list[torch.Tensor]] = {name: [] for name in EXIT_TESTS}
    old = None
    for step in range(1, num_steps + 1):
        logits = read(step)
        log_p = F.log_softmax(logits, dim=-1)
        best = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
        kept["top"].append(best.indices)
        kept["probability"].append(best.values.exp())
        kept["entropy"].append(-(log_p.exp() * log_p).sum(-1))
        kept["kl"].append((last.exp() * (last - log_p)).sum(-1).clamp(min=0))
        loss = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        kept["loss"].append(loss.masked_fill(~expected, float("nan")))
        if old is not None:
            for name, test in EXIT_TESTS.items():
                pair = (logits, old) if test.of_logits else (states[:, step].float(), states[:, step - 1].float())
                courses[name].append(test.compare(*pair).cpu())
        old = logits
    stacked = {name: torch.stack(values, dim=1).cpu().numpy() for name, values in kept.items()}
    return Predictions(
        top=stacked["top"],
        probability=stacked["probability"],
        entropy=stacked["entropy"],
        kl_to_last=stacked["kl"],
        loss=stacked["loss"],
        exits={
            name: exit_steps(EXIT_TESTS[name], torch.stack(course), EXIT_TESTS[name].threshold).numpy()
            for name, course in courses.items()
        },
    )


@torch.no_grad()
def runs_from_starts(model: RecurrentDepthForCausalLM, row: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
    """The states `[T, R + 1, D]`, in fp32, of runs from zeros, from the embedded input, and from noise of its size.

    Args:
        row: ids `[1, T]`.
    """
    stack = model.transformer
    x = stack.embed(row)
    context = stack.context(x)
    context.continued = True  # none of these is the model's own s_0
    embedded = stack.run_prelude(x, context)
    size = embedded.float().pow(2).mean(-1, keepdim=True).sqrt()
    starts = [torch.zeros_like(embedded), embedded]
    for seed in range(NOISE_STARTS):
        noise = position_noise(seed, context.position_ids, model.config.n_embd)
        starts.append((noise * size).to(embedded.dtype))
    for state in starts:
        run = [state]
        for step in range(1, num_steps + 1):
            run.append(stack.step(embedded, run[-1], context, step))
        yield torch.stack([state[0].float().cpu() for state in run], dim=1)


@contextmanager
def _written_out_attention(model: RecurrentDepthForCausalLM) -> Iterator[None]:
    """Attention that forward-mode derivatives can go through."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def stretch_by_step(
    model: RecurrentDepthForCausalLM, ids: Sequence[int], num_steps: int, steps: Sequence[int]
) -> dict[int, Stretch]:
    """The largest singular value of the Jacobian of whole steps, all tokens of a text together, by step.

    Args:
        ids: `[T]`.
        steps: of 1 … num_steps, at whose s_{i−1} the Jacobian is taken.
    """
    stack = model.transformer
    row = torch.tensor([list(ids)], device=model.device)
    found = {}
    with _written_out_attention(model):
        with torch.no_grad():
            x = stack.embed(row)
            context = stack.context(x)
            embedded = stack.run_prelude(x, context)
            state = stack.initial_state(embedded, context.position_ids, None)
        for step in range(1, num_steps + 1):
            if step in steps:

                def one_step(s: torch.Tensor, step: int = step) -> torch.Tensor:
                    return stack.step(embedded, s, context, step)

                found[step] = largest_stretch(one_step, state, STRETCH_ITERATIONS, STRETCH_TOLERANCE)
            with torch.no_grad():
                state = stack.step(embedded, state, context, step)
    return found
