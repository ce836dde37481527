"""How deep each training step goes, and how fast it learns, as functions of the run's progress in [0, 1]."""

import torch

from redepth.modeling.depth import sample_num_steps

from .recipe import HealRecipe


def mean_recurrence(recipe: HealRecipe, progress: float) -> float:
    """The curriculum's mean number of steps (McLeish et al. 2025, section 4)."""
    ramp = min(progress / recipe.curriculum_fraction, 1.0)
    if recipe.curriculum == "constant":
        return recipe.mean_recurrence
    if recipe.curriculum == "one-minus-sqrt":
        ramp = 1 - (1 - ramp) ** 0.5
    return recipe.curriculum_start + (recipe.mean_recurrence - recipe.curriculum_start) * ramp


def depth_of_step(recipe: HealRecipe, global_step: int, progress: float) -> tuple[int, int]:
    """(steps without gradient, steps with gradient) of one optimiser step.

    The draw is seeded by the global step, so that every process and every resumed run draws the same.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + global_step)
    return sample_num_steps(mean_recurrence(recipe, progress), recipe.backprop_depth, generator)


def learning_rate_factor(recipe: HealRecipe, progress: float) -> float:
    """Warm-up, stable, decay: the share of the full rate."""
    rising = progress / recipe.warmup if recipe.warmup else 1.0
    falling = (1 - progress) / recipe.decay if recipe.decay else 1.0
    return max(min(rising, falling, 1.0), 0.0)
