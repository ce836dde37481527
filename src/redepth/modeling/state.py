"""The initial state s_0 that the core iterates from."""

import torch
from torch import nn

from .configuration import RecurrentDepthConfig

_MASK_32 = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash of each entry, in int64 arithmetic that cannot overflow."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK_32
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK_32
    return (x >> 16) ^ x


def lacks_fp64(device: torch.device) -> bool:
    """Whether a device can't compute in double precision, on which a hash's even spread over the normal's tails rests."""
    return device.type == "mps"


def position_noise(seed: int, position_ids: torch.Tensor, width: int) -> torch.Tensor:
    """Normal noise cut at ±3, a function of (seed, position, channel) alone.

    A counter-based generator: row, batch and history play no part, so cached, batched and whole-sequence runs agree.

    Args:
        seed: any integer.
        position_ids: `[batch, tokens]`.
        width: number of channels.

    Returns:
        `[batch, tokens, width]` in fp32, unit variance before the cut.
    """
    if lacks_fp64(position_ids.device):
        return position_noise(seed, position_ids.cpu(), width).to(position_ids.device)
    channels = torch.arange(width, device=position_ids.device)
    start = _mix(torch.tensor(seed & _MASK_32, device=position_ids.device))
    positions = _mix(start ^ (position_ids.long() & _MASK_32))
    bits = _mix(_mix(positions[..., None] ^ channels) + 0x9E3779B9 & _MASK_32)
    uniform = (bits.double() + 0.5) / 2**32
    tail = 0.5 * torch.erfc(torch.tensor(3 / 2**0.5, dtype=torch.float64, device=position_ids.device))
    return torch.special.ndtri(tail + uniform * (1 - 2 * tail)).float()


def fresh_noise(like: torch.Tensor) -> torch.Tensor:
    """Normal noise cut at ±3 from torch's own generator, in fp32, for training."""
    return torch.nn.init.trunc_normal_(torch.empty_like(like, dtype=torch.float32), a=-3.0, b=3.0)


class StateGate(nn.Module):
    """s_i = α ⊙ f(s_{i−1}) + (1 − α) ⊙ s_{i−1}, for a step f, with α = sigmoid(weight) for each channel.

    A highway's gate (Srivastava et al. 2015) that depends on the channel alone. Channels start with α spread evenly over
    (0, 1), so that some follow a step at once and others remember many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(
        self, before: torch.Tensor, after: torch.Tensor, is_first: bool = False, continued: bool | torch.Tensor = True
    ) -> torch.Tensor:
        """s_i, from s_{i−1} and f(s_{i−1}), all `[B, T, D]`.

        A first step from s_0 goes without the gate, so that r = 1 is as without it.

        Args:
            continued: whether a first step began from a state carried over, and not from s_0; `[B, T]` where that differs.
        """
        if is_first and continued is False:
            return after
        before = before.to(after.device)
        gated = before + self.weight.float().sigmoid().to(after.dtype) * (after - before)
        if is_first and isinstance(continued, torch.Tensor):
            return torch.where(continued[..., None].to(after.device), gated, after)
        return gated


def gate_start(width: int) -> torch.Tensor:
    """The gate's weights `[D]` with which α is spread evenly over (0, 1), neighbouring channels far apart."""
    golden = 0.6180339887498949
    return ((torch.arange(width, dtype=torch.float64) + 0.5) * golden % 1).logit(eps=1e-3).float()


def initial_state(
    config: RecurrentDepthConfig, embedded: torch.Tensor, position_ids: torch.Tensor, seed: int | None, fresh: bool
) -> torch.Tensor:
    """s_0 for e `[B, T, D]`, of the same shape and dtype.

    Args:
        position_ids: `[B or 1, T]`.
        seed: of a noise state; the config's by default.
        fresh: draw noise anew, for training.
    """
    if config.initial_state_mode in ("embed", "skip-adapter"):
        return embedded
    if config.initial_state_mode == "zeros":
        return torch.zeros_like(embedded)
    assert config.init_values is not None
    std = config.state_std if config.state_std is not None else config.init_values["std"]
    scale = config.state_scale if config.state_scale is not None else config.embed_scale
    if fresh:
        noise = fresh_noise(embedded)
    else:
        chosen = seed if seed is not None else config.state_seed
        noise = position_noise(chosen, position_ids, config.n_embd).expand_as(embedded)
    return (noise * (std * scale)).to(embedded.dtype)
