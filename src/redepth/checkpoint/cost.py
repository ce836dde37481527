"""Parameters and floating-point operations of a recurrent model, as the published accounting counts them."""

from dataclasses import asdict, dataclass

from redepth.modeling.fields import LRU_LAYER, RecurrentDepthFields


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


def count_parameters(config: RecurrentDepthFields) -> ParameterCount:
    """Counts from the configuration alone; no weights are made, and no module."""
    width, table = config.n_embd, config.vocab_size * config.n_embd
    first_core = config.n_layers_in_prelude
    first_coda = first_core + config.n_layers_in_recurrent_block
    layers = [_layer(config, index) for index in range(first_coda + config.n_layers_in_coda)]
    return ParameterCount(
        embedding=table,
        prelude=sum(layers[:first_core]),
        core=sum(layers[first_core:first_coda]) + 2 * width * width + (width if config.state_gate else 0),
        coda=sum(layers[first_coda:]) + width,
        head=0 if config.tie_embeddings else table,
    )


def _layer(config: RecurrentDepthFields, layer: int) -> int:
    """Parameters of one block: its mixer, its mlp and its norms."""
    width, inner = config.n_embd, config.intermediate_size
    mixer = _recurrence(config) if config.layer_type(layer) == LRU_LAYER else _attention(config)
    mlp = _linear(width, 2 * inner, config.mlp_bias) + _linear(inner, width, config.mlp_bias)
    norms = 4 if config.norm_placement in ("sandwich", "huginn") else 2
    return mixer + mlp + norms * width


def _attention(config: RecurrentDepthFields) -> int:
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    queries, keys = config.n_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    count = _linear(config.n_embd, queries + 2 * keys, config.qkv_bias) + _linear(
        queries, config.n_embd, config.proj_bias
    )
    count += 2 * queries if config.qk_bias else 0
    return count + {"full": queries + keys, "head": 2 * config.head_dim, None: 0}[config.qk_norm]


def _recurrence(config: RecurrentDepthFields) -> int:
    """Griffin's recurrent block: three projections, the convolution, decays, and two gates by head."""
    assert config.lru_width is not None
    width, inner = config.n_embd, config.lru_width
    projections = 2 * _linear(width, inner, True) + _linear(inner, width, True)
    gates = 2 * (inner * (inner // config.n_heads) + inner)
    return projections + inner * config.conv1d_width + inner + inner + gates


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def training_flops_per_token(count: ParameterCount, steps_without: int, steps_with: int) -> float:
    """6·[P + min(r, s)·R + C + max(0, r − s)·R/3] for r steps of which the last s carry a gradient.

    A step without gradient costs its forward pass alone, a third of the whole (McLeish et al. 2025).
    """
    return 6.0 * (count.prelude + steps_with * count.core + count.coda + steps_without * count.core / 3)
