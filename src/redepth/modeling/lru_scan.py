"""The gated linear recurrence h_t = a_t · h_{t-1} + x_t, forward and backward, in time-parallel chunks.

It is in this folder because a checkpoint's code can import only from its own folder.
Shapes: B batch, T tokens, D channels, C tokens of a chunk, N chunks.
"""

from typing import Any

import torch

from .errors import UserError

# The registry of operators is global, and a checkpoint's copy of this file may be loaded beside the package's own.
_OPERATOR = "redepth::" + "".join(c if c.isalnum() else "_" for c in __name__)


def linear_scan_reference(
    x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor | None = None, reset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_scan` as it is defined: one token after another."""
    x, a, h0 = _checked(x, a, h0, reset)
    states, h = [], h0
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        states.append(h)
    return (torch.stack(states, dim=1) if states else torch.zeros_like(x)), h


def linear_scan(
    x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor | None = None, reset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = a_t · h_{t-1} + x_t along dimension 1, in fp32 (fp64 where an input is fp64).

    Nothing is divided and no logarithm taken, so any a in [0, 1] is safe, the ends included. The gradient is a scan of
    the same kind from the end; it keeps a and h and nothing else. There is no second derivative.

    Args:
        x, a: `[B, T, D]`.
        h0: the state before the first token, `[B, D]`; zeros by default.
        reset: `[B, T]`, bool, true where a document starts: the state before that token counts as zero.

    Returns:
        every h_t `[B, T, D]`, and the last one `[B, D]` (h0 where T is 0).

    Raises:
        ValueError: for shapes that do not fit.
    """
    x, a, h0 = _checked(x, a, h0, reset)
    if x.shape[1] == 0:
        return torch.zeros_like(x), h0
    h = torch.addcmul(x, a, h0[:, None]) if x.shape[1] == 1 else _scan_op(x, a, h0)
    return h, h[:, -1]


def _checked(
    x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor | None, reset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs in the dtype of the recurrence, with the resets written into a."""
    if x.ndim != 3 or a.shape != x.shape:
        raise UserError(f"x and a must both be [batch, tokens, channels], got {list(x.shape)} and {list(a.shape)}")
    batch, tokens, channels = x.shape
    if h0 is not None and h0.shape != (batch, channels):
        raise UserError(f"h0 must be [{batch}, {channels}], got {list(h0.shape)}")
    if reset is not None and (reset.shape != (batch, tokens) or reset.dtype != torch.bool):
        raise UserError(f"reset must be bool [{batch}, {tokens}], got {reset.dtype} {list(reset.shape)}")
    dtype = torch.float64 if torch.float64 in (x.dtype, a.dtype) else torch.float32
    x, a = x.to(dtype), a.to(dtype)
    if reset is not None:
        a = a.masked_fill(reset[..., None], 0.0)
    return x, a, x.new_zeros(batch, channels) if h0 is None else h0.to(dtype)


def _chunk_length(tokens: int) -> int:
    """C: about the root of T, where the steps within a chunk and those over chunks balance."""
    return 16 if tokens < 512 else 32 if tokens < 8192 else 64


def _scan(x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor, reverse: bool) -> torch.Tensor:
    """All states of the recurrence, from the last token to the first where `reverse`.

    Three passes, each a loop of whole-tensor operations: what every chunk makes of a zero state, and its product of a
    (C steps, all chunks at once); the state that enters each chunk (N steps); every state (C steps). It reads x and a
    twice and writes h once, and was the fastest of those tried on CPU: a loop over tokens takes 4 to 7 times as long at
    4,096 tokens of 256 to 512 channels, and doubling (Hillis and Steele 1986) more than that.
    """
    tokens = x.shape[1]
    order = slice(None, None, -1 if reverse else 1)
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    length = _chunk_length(tokens)
    chunks = tokens // length
    whole = chunks * length
    state = h0
    # Backwards in time, the tokens that do not fill a chunk come first.
    parts = [slice(0, whole), slice(whole, tokens)][order]
    for part in parts:
        if part.stop == part.start:
            continue
        if part.start == whole:
            for xt, at, ht in zip(
                x[:, part].unbind(1)[order], a[:, part].unbind(1)[order], h[:, part].unbind(1)[order], strict=True
            ):
                state = torch.addcmul(xt, at, state, out=ht)
            continue
        # C tensors [B, N, D] each.
        xs, as_, hs = (tensor[:, part].unflatten(1, (chunks, length)).unbind(2)[order] for tensor in (x, a, h))
        end, product = xs[0].clone(), as_[0].clone()
        for xc, ac in zip(xs[1:], as_[1:], strict=True):
            torch.addcmul(xc, ac, end, out=end)
            product.mul_(ac)
        # From here on `end` holds, chunk by chunk, the state that enters instead of the one that leaves.
        for leaving, decay in zip(end.unbind(1)[order], product.unbind(1)[order], strict=True):
            entering = state
            state = torch.addcmul(leaving, decay, entering)
            leaving.copy_(entering)
        previous = end
        for xc, ac, hc in zip(xs, as_, hs, strict=True):
            previous = torch.addcmul(xc, ac, previous, out=hc)
    return h


# Operators of their own, so that torch.compile sees one call and does not unroll the loops.
@torch.library.custom_op(_OPERATOR, mutates_args=())
def _scan_op(x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
    return _scan(x, a, h0, reverse=False)


@torch.library.custom_op(_OPERATOR + "_backward", mutates_args=())
def _scan_backward_op(
    grad: torch.Tensor, a: torch.Tensor, h0: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, a and h0. With g_t = ∂/∂h_t + a_{t+1} g_{t+1}: ∂/∂x_t = g_t and ∂/∂a_t = g_t h_{t-1}."""
    following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
    grad_x = _scan(grad, following, torch.zeros_like(h0), reverse=True)
    grad_a = torch.empty_like(grad_x)
    torch.mul(grad_x[:, 1:], h[:, :-1], out=grad_a[:, 1:])
    torch.mul(grad_x[:, 0], h0, out=grad_a[:, 0])
    return grad_x, grad_a, grad_x[:, 0] * a[:, 0]


@_scan_op.register_fake
def _(x: torch.Tensor, a: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan_backward_op.register_fake
def _(
    grad: torch.Tensor, a: torch.Tensor, h0: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like), torch.empty_like(h0, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    _, a, h0 = inputs
    ctx.save_for_backward(a, h0, output)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _scan_backward_op(grad, *ctx.saved_tensors)


_scan_op.register_autograd(_backward, setup_context=_keep_for_backward)
