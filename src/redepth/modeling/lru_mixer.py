"""Griffin's recurrent block (De et al. 2024, section 2.4): the gated linear recurrence that both models use as a mixer.

Shapes: B batch, T tokens, D width, R width of the recurrence, H heads, W width of a head (R / H), C taps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .elementwise import BLOCK, fits_no_cache, times
from .lru_scan import linear_scan
from .lru_state import LruState

# exponent of the decay: a = σ(Λ)^(c · gate), Griffin's equation 3
DECAY_POWER = 8.0
# fan-in variance of fresh gates and convolutions, RecurrentGemma's `w_init_variance_scale`
GATE_VARIANCE = 0.01
# largest slope of the square root in the input's normalisation
MAX_ROOT_SLOPE = 1000.0


class InputScale(torch.autograd.Function):
    """√(1 − a²) of log a, with the slope of the root bounded: it is infinite at a = 1."""

    @staticmethod
    def forward(ctx: Any, log_a: torch.Tensor) -> torch.Tensor:
        square = -torch.expm1(2 * log_a)
        ctx.save_for_backward(square)
        return square.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (square,) = ctx.saved_tensors
        # d(1 − a²)/d(log a) = −2a², and that of the root 1 / (2√(1 − a²)).
        slope = (4 * square).clamp_(min=MAX_ROOT_SLOPE**-2).rsqrt_()
        return grad * slope * (2 * (square - 1))


@dataclass
class Timeline:
    """What a recurrence has to know about the columns of one pass, where padding is to the left of a row's tokens."""

    # Whether every row's text starts at column 0, and no text starts elsewhere.
    fresh: bool = False
    # `[B, T]`, where a text starts, if that is not said by `fresh`.
    starts: torch.Tensor | None = None
    # `[B, T]`, how many columns lie between a token and its document's start, where a pass holds several documents.
    since_start: torch.Tensor | None = None
    # `[B, T]`, which columns are tokens; None if all.
    real: torch.Tensor | None = None
    # The reordering that puts new padding left of the stored inputs, `[B, C - 1 + T]`.
    input_order: torch.Tensor | None = None
    # `[B, T]`, the same of the caller's columns, where they were moved to put padding left.
    given: torch.Tensor | None = None

    def croppable_after(self, before: int, tokens: int) -> int:
        """How many of the caller's columns can be taken back after this pass over `tokens`, if all of it is recorded.

        Args:
            before: how many could before it.
        """
        if self.real is None:
            return before + tokens
        # Beside padding a column is a token of every row or can't be taken back. Moving padding left leaves the last
        # columns, up to the last padding of any row, where they are.
        given = self.given if self.given is not None else self.real
        return int(given.all(0).flip(0).long().cumprod(0).sum())


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit: h_t = a_t h_{t-1} + √(1 − a_t²) (i_t x_t), a and i gates of x_t."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        head = width // heads
        self.recurrent_param = nn.Parameter(torch.empty(width))
        self.input_gate_weight = nn.Parameter(torch.empty(heads, head, head))
        self.input_gate_bias = nn.Parameter(torch.empty(heads, head))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(heads, head, head))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(heads, head))

    def fresh_start(self, variance_scale: float) -> None:
        """The published start: gates normal by fan-in, biases zero, squared decays even in 0.9² … 0.999²."""
        std = (variance_scale / self.input_gate_weight.shape[1]) ** 0.5
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            init.normal_(weight, mean=0.0, std=std)
        for bias in (self.input_gate_bias, self.recurrent_gate_bias):
            init.zeros_(bias)
        # a = exp(−8 · gate · softplus(Λ)); Λ is chosen so that softplus(Λ) = −log(a) for the drawn a.
        square = torch.empty_like(self.recurrent_param).uniform_(0.9**2, 0.999**2)
        init.copy_(self.recurrent_param, torch.log(torch.expm1(-0.5 * torch.log(square))))

    def _gate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """σ of a block-diagonal product: `x` `[B, T, R]` in, the same out in fp32."""
        heads = x.flatten(0, 1).unflatten(-1, weight.shape[:2]).transpose(0, 1)  # [H, B·T, W]
        gate = torch.baddbmm(bias[:, None], heads.to(weight.dtype), weight).transpose(0, 1)
        # One copy for layout and dtype.
        gate = gate.to(torch.float32, memory_format=torch.contiguous_format).reshape(x.shape)
        return gate.sigmoid() if gate.requires_grad else gate.sigmoid_()

    def forward(self, x: torch.Tensor, timeline: Timeline) -> tuple[torch.Tensor, torch.Tensor]:
        """What the recurrence adds, and the factor by which the state decays: √(1 − a²) (i x) and a, `[B, T, R]` each, in fp32."""
        log_a = self._gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_a = times(log_a, -DECAY_POWER * nn.functional.softplus(self.recurrent_param.float()))
        # Without a graph, in-place operations do the same with less memory.
        learning = log_a.requires_grad
        scale = InputScale.apply(log_a) if learning else (2 * log_a).expm1_().neg_().sqrt_()
        # The first input of a text enters without the factor √(1 − a²).
        if timeline.fresh:
            scale = scale.index_fill(1, torch.zeros(1, dtype=torch.long, device=x.device), 1.0)
        elif timeline.starts is not None:
            scale = scale.masked_fill(timeline.starts[..., None], 1.0)
        added = self._gate(x, self.input_gate_weight, self.input_gate_bias)
        added, a = (x * added * scale, log_a.exp()) if learning else (added.mul_(x).mul_(scale), log_a.exp_())
        if timeline.real is not None:
            # Padding neither adds to the state nor lets it decay.
            added, a = added * timeline.real[..., None], a.masked_fill(~timeline.real[..., None], 1.0)
        return added, a


class CausalConv(nn.Conv1d):
    """The short convolution before the recurrence, with its weights under their published names."""

    def forward(self, inputs: torch.Tensor, timeline: Timeline) -> torch.Tensor:  # type: ignore[override]
        """Channelwise causal convolution of `inputs` `[B, C - 1 + T, R]`; returns `[B, T, R]` in fp32."""
        assert self.bias is not None
        weight, bias, inputs = self.weight[:, 0].float(), self.bias.float(), inputs.float()
        tokens = inputs.shape[1] - self.kernel_size[0] + 1
        if tokens == 1 and timeline.since_start is None:
            # The time of decoding depends on the number of small operations.
            return (inputs * weight.T).sum(1, keepdim=True) + bias
        taps = weight.unbind(-1)
        out = torch.addcmul(bias, inputs[:, len(taps) - 1 :], taps[-1])
        for distance in range(1, len(taps)):
            start = len(taps) - 1 - distance
            reached = inputs[:, start : start + tokens]
            if timeline.since_start is not None:
                reached = reached * (timeline.since_start >= distance)[..., None]
            out.addcmul_(reached, taps[start])
        return out


class LruBlock(nn.Module):
    """Griffin's recurrent block: a short causal convolution and the RG-LRU, gated by a second branch."""

    def __init__(self, width: int, lru_width: int, heads: int, taps: int, activation: str) -> None:
        super().__init__()
        self.linear_y = nn.Linear(width, lru_width)
        self.linear_x = nn.Linear(width, lru_width)
        self.linear_out = nn.Linear(lru_width, width)
        self.conv_1d = CausalConv(lru_width, lru_width, taps, groups=lru_width)
        self.rg_lru = RGLRU(lru_width, heads)
        self.act_fn = ACT2FN[activation]

    def with_past(self, x: torch.Tensor, timeline: Timeline, memory: LruState | None) -> torch.Tensor:
        """The convolution's inputs, `[B, C - 1 + T, R]`: x `[B, T, R]` after those remembered, or zeros."""
        if memory is not None:
            return memory.with_inputs(x, timeline.input_order)
        return nn.functional.pad(x, (0, 0, self.conv_1d.kernel_size[0] - 1, 0))

    def forward(self, x: torch.Tensor, timeline: Timeline, memory: LruState | None = None) -> torch.Tensor:
        """`x` is `[B, T, D]`; returns `[B, T, D]`. The memory, if given, advances by T tokens."""
        gate = self.act_fn(self.linear_y(x))
        return self.linear_out(times(gate, self._recur(self.linear_x(x), timeline, memory)))

    def _recur(self, x: torch.Tensor, timeline: Timeline, memory: LruState | None) -> torch.Tensor:
        """Convolution and recurrence of `x` `[B, T, R]`, in its dtype."""
        simple = timeline.real is timeline.starts is timeline.since_start is None
        if simple and fits_no_cache(x) and not (memory is not None and memory.record_past):
            carried = memory if memory is not None else LruState(self.conv_1d.kernel_size[0])
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            for index, (part, place) in enumerate(zip(x.split(BLOCK, 1), out.split(BLOCK, 1), strict=True)):
                place.copy_(self._recur(part, Timeline(fresh=timeline.fresh and index == 0), carried))
            return out
        if timeline.real is not None:
            x = x * timeline.real[..., None]
        mixed = self.conv_1d(self.with_past(x, timeline, memory), timeline)
        added, decay = self.rg_lru(mixed, timeline)
        return scan_on(added, decay, timeline, memory).to(x.dtype)


def scan_on(added: torch.Tensor, decay: torch.Tensor, timeline: Timeline, memory: LruState | None) -> torch.Tensor:
    """Every state h `[B, T, R]` of the recurrence, in fp32, starting from the stored one, which advances."""
    h, _ = linear_scan(added, decay, memory.state() if memory is not None else None, timeline.starts)
    if memory is not None:
        memory.store_states(h)
    return h
