"""Fitting exit heads: from a calibration's states and what the tests of logits measured there."""

from itertools import pairwise

import torch
from torch.nn import functional as F

from redepth.modeling.exit_heads import ExitHead
from redepth.modeling.exits import ExitTest

DIRECTIONS = 16
FITTING_STEPS = 300
FITTING_RATE = 0.05
SMALLEST = 1e-12  # of measures, so that their logarithm is a number


def main_directions(states: list[torch.Tensor]) -> torch.Tensor:
    """The directions in which states move most, whatever their speed, fp32 `[K, D]`.

    Args:
        states: s_1 … s_R, each `[T, D]`.
    """
    covariance = torch.zeros(states[0].shape[-1], states[0].shape[-1], device=states[0].device)
    for old, new in pairwise(states):
        change = F.normalize(new.float() - old.float(), dim=-1)
        covariance += change.T @ change
    chosen = torch.linalg.eigh(covariance).eigenvectors[:, -DIRECTIONS:].T
    # As they are stored, so that thresholds hold for the very numbers that are read later.
    return chosen.half().float()


@torch.enable_grad()
def fit_weights(test: ExitTest, found: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
    """Weights, none below 0, with which the features tell what a test measured, `[K + 1]`.

    Args:
        found: features of N states, `[N, K + 1]`.
        measured: what the test measured there, `[N]`.
    """
    found, measured = found.double(), measured.double()
    usual = (measured.mean() / found.sum(-1).mean().clamp(min=SMALLEST)).clamp(min=SMALLEST)
    logarithms = usual.log().expand(found.shape[-1]).clone().requires_grad_()
    optimizer = torch.optim.Adam([logarithms], lr=FITTING_RATE)
    for _ in range(FITTING_STEPS):
        told = (found @ logarithms.exp()).clamp(min=SMALLEST)
        if test.streak is None:  # yes or no: a rate
            loss = (told - measured * told.log()).mean()
        else:  # over many orders of magnitude
            loss = (told.log() - measured.clamp(min=SMALLEST).log()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logarithms.detach().exp().float()


def fit_head(test: ExitTest, directions: torch.Tensor, found: torch.Tensor, measured: torch.Tensor) -> ExitHead:
    """The exit head that stands in for a test of logits; arguments as of `fit_weights`."""
    weights = fit_weights(test, found, measured)
    return ExitHead(directions, torch.tensor([float(f"{weight:.4g}") for weight in weights.tolist()]))
