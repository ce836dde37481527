"""Parameters and floating-point operations of a recurrent model, as the published accounting counts them."""

from dataclasses import asdict, dataclass

import torch

from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of each part; the adapter and the state's gate are part of the core, a tied head counts nothing of its own."""

    embedding: int
    prelude: int
    core: int
    coda: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.prelude + self.core + self.coda + self.head

    def by_part(self) -> dict[str, int]:
        """Each part's parameters by its name, and `total`."""
        return asdict(self) | {"total": self.total}

    def forward_flops_per_token(self, num_steps: int) -> float:
        """2·[P + r·R + C]: the matrix products of the layers, without attention scores, embedding and head."""
        return 2.0 * (self.prelude + num_steps * self.core + self.coda)


def count_parameters(config: RecurrentDepthConfig) -> ParameterCount:
    """Counts from the configuration alone; no weights are made."""
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    parts = model.transformer

    def size(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    return ParameterCount(
        embedding=size(parts["wte"]),
        prelude=size(parts["prelude"]),
        core=size(parts["core_block"], parts["adapter"], *([parts.state_gate] if parts.state_gate is not None else [])),
        coda=size(parts["coda"], parts["ln_f"]),
        head=0 if config.tie_embeddings else size(model.lm_head),
    )


def training_flops_per_token(count: ParameterCount, steps_without: int, steps_with: int) -> float:
    """6·[P + min(r, s)·R + C + max(0, r − s)·R/3] for r steps of which the last s carry a gradient.

    A step without gradient costs its forward pass alone, a third of the whole (McLeish et al. 2025).
    """
    return 6.0 * (count.prelude + steps_with * count.core + count.coda + steps_without * count.core / 3)
