"""How deep each training step goes, and how fast it learns, as functions of the run's progress in [0, 1]."""

import torch

from redepth.modeling.policy import sample_num_steps

from .recipe import HealRecipe
from .supervision import deepest_of


def _along(curve: str, progress: float, fraction: float, start: float, end: float) -> float:
    """The value at this progress between start and end, reached after `fraction` of the run (McLeish et al. 2025, section 4)."""
    ramp = min(progress / fraction, 1.0)
    if curve == "constant":
        return end
    if curve == "one-minus-sqrt":
        ramp = 1 - (1 - ramp) ** 0.5
    return start + (end - start) * ramp


def mean_recurrence(recipe: HealRecipe, progress: float) -> float:
    """The mean of the sampled number of steps."""
    return _along(
        recipe.curriculum, progress, recipe.curriculum_fraction, recipe.curriculum_start, recipe.mean_recurrence
    )


def backprop_depth(recipe: HealRecipe, progress: float) -> int:
    """How many of the last steps carry a gradient."""
    return round(
        _along(
            recipe.backprop_curriculum,
            progress,
            recipe.backprop_fraction,
            recipe.backprop_start,
            recipe.backprop_depth,
        )
    )


def depth_of_step(recipe: HealRecipe, global_step: int, progress: float, earned: int | None = None) -> tuple[int, int]:
    """(steps without gradient, steps with gradient) of one optimiser step.

    The draw is seeded by the global step, so that every process and every resumed run draws the same.

    Args:
        earned: the depth that the run has come to; the deepest it may come to by default.
    """
    with_gradient = backprop_depth(recipe, progress)
    generator = torch.Generator().manual_seed(recipe.seed_of(global_step))
    if recipe.depth_sampling == "log-normal-poisson":
        return sample_num_steps(mean_recurrence(recipe, progress), with_gradient, generator)
    if recipe.depth_sampling == "fixed":
        steps = round(mean_recurrence(recipe, progress))
    else:
        steps = deepest_of(recipe, progress)
        if recipe.depth_sampling == "earned" and earned is not None:
            steps = earned
        is_newest = recipe.depth_sampling == "earned" and torch.rand((), generator=generator) < recipe.newest_share
        if recipe.depth_sampling != "difficulty" and not is_newest:
            steps = int(torch.randint(1, steps + 1, (), generator=generator))
    return max(steps - with_gradient, 0), min(steps, with_gradient)


def mean_depth(recipe: HealRecipe, progress: float, earned: int | None = None) -> float:
    """The mean of what `depth_of_step` gives at this point of the run."""
    if recipe.depth_sampling in ("log-normal-poisson", "fixed"):
        return mean_recurrence(recipe, progress)
    deepest = earned if earned is not None else deepest_of(recipe, progress)
    newest = {"difficulty": 1.0, "up-to-difficulty": 0.0, "earned": recipe.newest_share}[recipe.depth_sampling]
    return newest * deepest + (1 - newest) * (deepest + 1) / 2


def learning_rate_factor(recipe: HealRecipe, progress: float) -> float:
    """Warm-up, stable, decay: the share of the full rate."""
    rising = progress / recipe.warmup if recipe.warmup else 1.0
    falling = (1 - progress) / recipe.decay if recipe.decay else 1.0
    return max(min(rising, falling, 1.0), 0.0)
