"""Which plan to convert by: layers measured, candidate plans tried on text without training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from redepth.checkpoint.sources import Source
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.fields import GROUP_MODULES
from redepth.modeling.loss import chunked_cross_entropy

from .convert import Conversion, plan_conversion
from .plan import Plan
from .weights import ADAPTER, adapter_weight, parse_adapter

DEPTHS = (1, 2, 4, 8)
ADAPTERS = ("inject", "blend:0.125", "blend:0.25", "blend:0.5")
# The first look at every stretch is taken with this start on a quarter of the text.
SCREENING_ADAPTER = "blend:0.25"
SHORTLIST = 6
TOLERANCE = 0.005  # nats
STILL = 1e-3  # a state that a step changes by less counts as standing still
ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class LayerMeasure:
    """What one source layer does to the residual stream, averaged over tokens.

    Attributes:
        influence: 1 − cosine of its input and output ("block influence", Men et al. 2024, "ShortGPT", equation 1).
        distance: angle between its input and the output of the last of the `core_layers` layers that begin with it,
            as a share of π (Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers", equation 7,
            here over all tokens); None where fewer layers follow.
    """

    layer: int
    influence: float
    distance: float | None


@dataclass(frozen=True)
class Candidate:
    """A plan with an adapter start, measured without training.

    Attributes:
        losses: nats per token by number of steps.
        movement: ‖s_i − s_{i−1}‖ / ‖s_i‖, averaged over tokens and over the steps from the second to the deepest.
    """

    plan: Plan
    adapter: str
    losses: dict[int, float]
    movement: float

    @property
    def mean_loss(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.plan.slices(),
            "dropped_layers": list(self.plan.dropped),
            "adapter": self.adapter,
            "losses": self.losses,
            "mean_loss": self.mean_loss,
            "movement": self.movement,
        }


@dataclass(frozen=True)
class PlanSearch:
    """Everything that was measured; candidates are in order of choice.

    Attributes:
        source_loss: of the unconverted model, in nats per token.
        tokens: how many were read.
        whole: candidates that keep every layer.
        dropping: candidates that drop `drop_layers` of them.
    """

    source: str
    tokens: int
    source_loss: float
    layers: list[LayerMeasure]
    whole: list[Candidate]
    dropping: list[Candidate]


def ranked(candidates: Sequence[Candidate], tolerance: float = TOLERANCE) -> list[Candidate]:
    """Candidates in order of choice.

    A candidate's loss is its mean over the depths. Those within `tolerance` of the lowest count as equal, and
    among them a longer core comes first, then the one whose steps move the state most: healing needs a state that each
    step takes further. The others follow by their loss. A core that leaves the state where it
    is can't be hurt by depth and can't use it either (`inject`), so such candidates come last.
    """
    moving = [one for one in candidates if one.movement >= STILL]
    lowest = min((one.mean_loss for one in moving), default=0.0)

    def order(one: Candidate) -> tuple[Any, ...]:
        if one.movement < STILL:
            return 2, one.mean_loss
        if one.mean_loss <= lowest + tolerance:
            return 0, -len(one.plan.core), -one.movement
        return 1, one.mean_loss

    return sorted(candidates, key=order)


def plans_of(num_layers: int, core_layers: int, drop_layers: int = 0) -> list[Plan]:
    """Every plan with one layer or more on either side of the core and the dropped layers next to the core.

    The dropped layers lie all before it, all after it, or in halves on both sides.
    """
    layers = tuple(range(num_layers))
    plans = []
    for before in sorted({0, drop_layers // 2, drop_layers}):
        after = drop_layers - before
        for start in range(1 + before, num_layers - core_layers - after):
            stop = start + core_layers
            plans.append(Plan(layers[: start - before], layers[start:stop], layers[stop + after :], num_layers))
    return plans


class _Bench:
    """A whole source's layers in one recurrent model, taken apart and put together again for each candidate."""

    def __init__(self, conversion: Conversion, autocast: torch.dtype | None) -> None:
        self.model = conversion.model()
        self.layers = [layer for group in GROUP_MODULES.values() for layer in self.model.transformer[group].children()]
        self.autocast = autocast

    def arrange(self, plan: Plan) -> None:
        for group, module in GROUP_MODULES.items():
            self.model.transformer[module] = nn.ModuleList(self.layers[layer] for layer in getattr(plan, group))

    def start(self, adapter: str) -> None:
        dtype = self.autocast or torch.float32
        self.model.get_parameter(ADAPTER).copy_(adapter_weight(adapter, self.model.config.n_embd, dtype))
        torch.clear_autocast_cache()  # which may hold the last start's weight

    def source_states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream before each source layer, and after the last: `[B, T, D]` each."""
        stack = self.model.transformer
        states = [stack.embed(ids)]
        stack.run_layers(nn.ModuleList(self.layers), states[0], stack.context(states[0]), record=states)
        return states

    def loss(self, state: torch.Tensor, ids: torch.Tensor) -> float:
        """Summed next-token loss, in nats, of a state that enters the coda."""
        model = self.model
        _, hidden = model.transformer.run_coda(state, model.transformer.context(state))
        return chunked_cross_entropy(hidden, ids, model.logits, model.config.vocab_size, num_items=1).item()

    def run(
        self,
        plan: Plan,
        adapters: Sequence[str],
        depths: Sequence[int],
        states: list[torch.Tensor],
        ids: torch.Tensor,
        source_loss: float,
    ) -> dict[str, tuple[dict[int, float], float]]:
        """Summed losses by depth, and summed movement, of one plan under each start.

        The prelude has run already: its output is the source's hidden state there. The first step is shared as well,
        since every start hands e to it unchanged; where no layer is dropped it has run too, and ends in the source's loss.
        """
        self.arrange(plan)
        embedded = states[len(plan.prelude)]
        self.start("inject")
        if plan.core[0] == len(plan.prelude):
            first = states[plan.core[-1] + 1]
        else:
            first, _, _ = self.model.iterate_one_step(embedded, embedded)
        first_loss = source_loss if plan.is_full_cover else self.loss(first, ids)
        found = {}
        for adapter in adapters:
            if adapter == "inject":  # every step is the first again
                found[adapter] = dict.fromkeys(depths, first_loss), 0.0
                continue
            self.start(adapter)
            losses, movement, state = {1: first_loss}, 0.0, first
            for step in range(2, max(depths) + 1):
                old = state
                state, _, _ = self.model.iterate_one_step(embedded, old, current_step=step - 1)
                movement += ((state - old).float().norm(dim=-1) / state.float().norm(dim=-1)).sum().item()
                if step in depths:
                    losses[step] = self.loss(state, ids)
            found[adapter] = {depth: losses[depth] for depth in depths}, movement / max(max(depths) - 1, 1)
        return found

    @torch.no_grad()
    def measure(
        self,
        plans: Sequence[Plan],
        adapters: Sequence[str],
        depths: Sequence[int],
        rows: torch.Tensor,
        on_done: Callable[[float], None],
        core_layers: int | None = None,
    ) -> tuple[list[Candidate], float, list[LayerMeasure]]:
        """Candidates in the order given, the source's loss, and its layers where `core_layers` is given."""
        keys = [(plan, adapter) for plan in plans for adapter in adapters]
        losses = {key: dict.fromkeys(depths, 0.0) for key in keys}
        movement = dict.fromkeys(keys, 0.0)
        source_total, batches = 0.0, rows.split(ROWS_AT_ONCE)
        cosines: list[torch.Tensor] = []
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            for batch, ids in enumerate(batches):
                states = self.source_states(ids)
                if core_layers is not None:
                    cosines.append(_cosines(states, core_layers))
                self.arrange(Plan(tuple(range(len(self.layers))), (), (), len(self.layers)))
                source_loss = self.loss(states[-1], ids)
                source_total += source_loss
                for done, plan in enumerate(plans, start=1):
                    found = self.run(plan, adapters, depths, states, ids, source_loss)
                    for adapter, (batch_losses, batch_movement) in found.items():
                        for depth in depths:
                            losses[plan, adapter][depth] += batch_losses[depth]
                        movement[plan, adapter] += batch_movement
                    on_done((batch + done / len(plans)) / len(batches))
        predicted = rows.shape[0] * (rows.shape[1] - 1)
        candidates = [
            Candidate(
                *key, {depth: loss / predicted for depth, loss in losses[key].items()}, movement[key] / rows.numel()
            )
            for key in keys
        ]
        return candidates, source_total / predicted, _layer_measures(cosines)


def _cosines(states: list[torch.Tensor], length: int) -> torch.Tensor:
    """By layer: summed 1 − cosine over that layer, summed angle over `length` layers, and tokens: `[layers, 3]`."""
    measured = []
    for layer, state in enumerate(states[:-1]):
        over_one = F.cosine_similarity(state.float(), states[layer + 1].float(), dim=-1)
        angle = torch.tensor(math.nan)
        if layer + length < len(states):
            over_all = F.cosine_similarity(state.float(), states[layer + length].float(), dim=-1)
            angle = over_all.clamp(-1, 1).arccos().sum() / math.pi
        measured.append(torch.stack([(1 - over_one).sum(), angle, torch.tensor(float(over_one.numel()))]))
    return torch.stack(measured)


def _layer_measures(cosines: list[torch.Tensor]) -> list[LayerMeasure]:
    if not cosines:
        return []
    influence, angle, tokens = torch.stack(cosines).sum(0).unbind(-1)
    return [
        LayerMeasure(layer, changed, None if math.isnan(turned) else turned)
        for layer, (changed, turned) in enumerate(
            zip((influence / tokens).tolist(), (angle / tokens).tolist(), strict=True)
        )
    ]


def check_search(
    source: Source,
    core_layers: int,
    drop_layers: int,
    adapters: Sequence[str],
    sequence_length: int,
    family: str | Path | None = None,
) -> Conversion:
    """What can be refused before any text or tensor is read; the source's conversion by the default plan.

    Raises:
        RedepthError: for a recurrent source or an unknown family, a core or a number of dropped layers that leaves no
            layer on either side of the core, a start that is unknown or random, or rows longer than the source allows.
    """
    if source.config.model_type == RecurrentDepthConfig.model_type:
        raise RedepthError(f"source {source.name!r} is recurrent already; give the model it was made from")
    conversion = plan_conversion(source, dtype="float32", family=family)
    num_layers = conversion.plan.num_layers
    if not 1 <= core_layers <= num_layers - 2:
        raise RedepthError(
            f"--core-layers {core_layers} doesn't fit: the source has {num_layers} layers, and prelude and coda need one "
            f"each; use 1 to {num_layers - 2}"
        )
    if not 0 <= drop_layers <= num_layers - 2 - core_layers:
        raise RedepthError(
            f"--drop-layers {drop_layers} doesn't fit: {num_layers} layers with a core of {core_layers} leave 0 to "
            f"{num_layers - 2 - core_layers} to drop"
        )
    for adapter in adapters:
        kind, _ = parse_adapter(adapter)
        if kind == "random":
            raise RedepthError("--adapter random has nothing to measure before training; use inject or blend:α")
        if kind == "gate":
            raise RedepthError(f"--adapter {adapter} is not tried by redepth plan; use inject or blend:α")
    if sequence_length > conversion.config.block_size:
        raise RedepthError(
            f"--sequence-length {sequence_length} is more than the {conversion.config.block_size} tokens the source allows"
        )
    return conversion


def search_plans(
    source: Source,
    rows: torch.Tensor,
    core_layers: int,
    drop_layers: int = 0,
    adapters: Sequence[str] = ADAPTERS,
    depths: Sequence[int] = DEPTHS,
    tolerance: float = TOLERANCE,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[str, float], None] | None = None,
    family: str | Path | None = None,
) -> PlanSearch:
    """Measure the source's layers and find the plans with the lowest loss before training.

    Every stretch of `core_layers` layers is looked at with one start on the first quarter of the rows; the best
    `SHORTLIST` of them are then measured with every start on all rows. The same is done with `drop_layers` layers
    dropped next to the core. Hidden states are shared: the source runs once over each batch.

    Args:
        rows: `[rows, tokens]`, without padding.
        adapters: starts to try, `inject` or `blend:α`.
        depths: numbers of steps to measure.
        tolerance: see `ranked`.
        autocast: dtype of the matrix products; fp32 if left out.
        on_progress: called with (part, share done).
        family: of a source that redepth has none for.

    Raises:
        RedepthError: as `check_search`.
    """
    conversion = check_search(source, core_layers, drop_layers, adapters, rows.shape[1], family)
    num_layers = conversion.plan.num_layers
    on_progress = on_progress or (lambda part, done: None)
    bench = _Bench(conversion, autocast)
    some_rows = rows[: max(len(rows) // 4, 1)]

    def find(plans: list[Plan], name: str, layers: bool) -> tuple[list[Candidate], float, list[LayerMeasure]]:
        looked_at, _, _ = bench.measure(
            plans, [SCREENING_ADAPTER], depths, some_rows, lambda done: on_progress(f"{name}: all", done)
        )
        shortlist = [one.plan for one in sorted(looked_at, key=lambda one: one.mean_loss)[:SHORTLIST]]
        candidates, source_loss, measures = bench.measure(
            shortlist,
            adapters,
            depths,
            rows,
            lambda done: on_progress(f"{name}: best", done),
            core_layers if layers else None,
        )
        return ranked(candidates, tolerance), source_loss, measures

    whole, source_loss, measures = find(plans_of(num_layers, core_layers), "whole", True)
    dropping: list[Candidate] = []
    if drop_layers:
        dropping, _, _ = find(plans_of(num_layers, core_layers, drop_layers), "dropping", False)
    return PlanSearch(source.name, rows.numel(), source_loss, measures, whole, dropping)
