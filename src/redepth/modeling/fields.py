"""What a configuration holds: its fields with their defaults, what follows from them, and what no model can have.

Neither torch nor transformers is imported here, so that a checkpoint can be looked at without waiting for them. The published
keys keep their names. The switches by which one family's block differs from another's are redepth's own keys; their defaults
describe Huginn-0125, so a published config needs none of them.
"""

from dataclasses import dataclass
from typing import Any, Literal

from .config_checks import ROPE_TYPES, check_fields, check_rope
from .errors import UserError

# The published names among them mean the same.
STATE_MODES = {
    "noise": "noise",
    "random": "noise",
    "like-init": "noise",
    "zeros": "zeros",
    "zero": "zeros",
    "embed": "embed",
    "embed-init": "embed",
    "skip-adapter": "skip-adapter",
}
# The three groups of layers, and the modules of the stack that hold them.
GROUP_MODULES = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
# The layer type of a recurrence in time; transformers allows no name of ours.
LRU_LAYER = "linear_attention"
NormPlacement = Literal["pre", "post", "sandwich", "huginn"]


@dataclass(eq=False, repr=False, kw_only=True)
class RecurrentDepthFields:
    r"""
    Args:
        n_embd (`int`): width of the residual stream.
        n_layers_in_prelude, n_layers_in_recurrent_block, n_layers_in_coda (`int`):
            layers in each of the three groups; the recurrent block is the core.
        mean_recurrence (`int`): the depth the model was trained for.
        mean_backprop_depth (`int`): how many of the last steps carry a gradient when training draws the depth.
        norm_placement (`str`): where a block normalises: `pre` x + f(n(x)); `post` x + n(f(x));
            `sandwich` x + n(f(n(x))); `huginn` n(x + f(n(x))).
        norm_weight (`str`): `plain` multiplies by w after the cast to the working dtype; `one_plus` by (1 + w) before.
        qk_norm (`str`, *optional*): `head` normalises each head of q and k; `full` the whole projection at once.
        qkv_bias (`bool`): bias on the fused q, k, v projection. `qk_bias` is Huginn's own bias on q and k.
        rope_style (`str`): `half` rotates channel i with i + head_dim/2; `interleaved` rotates 2i with 2i + 1.
        rope_layers (`list[bool]`, *optional*): per layer, whether it rotates q and k at all; all do by default.
        layer_types (`list[str]`, *optional*): per layer (prelude, core, coda in order) `full_attention`,
            `sliding_attention` or `linear_attention`; `sliding_window` tokens are visible to the second, the token itself
            included; the third is transformers' word for a recurrence, here Griffin's RG-LRU.
        lru_width (`int`, *optional*): width of the recurrence, `n_embd` by default; `n_heads` divides it.
        conv1d_width (`int`): taps of the convolution before the recurrence.
        proj_bias, mlp_bias (`bool`): bias on attention's output projection, and on the mlp's projections.
        query_scale (`float`, *optional*): factor on q·k, `head_dim ** -0.5` by default.
        norm_before_coda (`bool`): whether `ln_f` is applied to the last state before the coda, as Huginn does.
        initial_state_mode (`str`): s_0 is `noise`, `zeros`, or `embed` (the prelude's output e); `skip-adapter` is
        `embed`, and
            the first step runs the core on e itself, without the adapter.
        state_gate (`bool`): from the second step on a step moves each channel of the state by its own learnt share of the
            way, see `state.StateGate`. Published checkpoints have no such gate.
        state_std, state_scale (`float`, *optional*): noise is a normal cut at ±3 std with this std, times the scale;
            `init_values["std"]` and `init_values["embed_scale"]` by default.
        state_seed (`int`): seed of the noise outside training; position t's noise depends on (seed, t) alone.
        cache_rule (`str`): default rule of the cache, see `cache.RecurrentDepthCache`.
        num_steps (`int`, *optional*): the depth to run when none is given; the calibrated one, or else
        `mean_recurrence`,
            by default. It serves callers that can't pass one, as `from_pretrained(folder, num_steps=8)`.
        max_num_steps (`int`): a larger depth is refused as a mistake.
        depth_profile (`dict`, *optional*): what calibration measured: `num_steps`, the depth to use when none is given;
            `valid_range`, the smallest and the largest depth that work; `thresholds` of the exit tests by wanted
            agreement; and by number of steps, from 1, `loss`, `kl_to_deepest`, `agreement` and `exit_rates`.
    """

    vocab_size: int = 65536
    n_embd: int = 5280
    n_heads: int = 55
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 17920
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    n_layers: int | None = None
    mean_recurrence: int = 32
    mean_backprop_depth: int = 8
    block_size: int = 4096
    tie_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    norm_placement: NormPlacement = "huginn"
    norm_weight: Literal["plain", "one_plus"] = "plain"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    qk_bias: bool = True
    proj_bias: bool = False
    mlp_bias: bool = False

    rope_base: float = 50_000.0
    rope_parameters: dict[str, Any] | None = None
    rope_style: Literal["half", "interleaved"] = "interleaved"
    rope_layers: list[bool] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    lru_width: int | None = None
    conv1d_width: int = 4
    query_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    norm_before_coda: bool = True
    initial_state_mode: str = "noise"
    state_gate: bool = False
    state_std: float | None = None
    state_scale: float | None = None
    state_seed: int = 0
    cache_rule: str = "full"
    num_steps: int | None = None
    max_num_steps: int = 4096
    depth_profile: dict[str, Any] | None = None
    init_values: dict[str, float] | None = None

    # No fields: transformers' names for some of them, and the kinds of rotary positions that are known.
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }
    rope_types = ROPE_TYPES

    def derive(self, kept_elsewhere: dict[str, Any]) -> None:
        """Set what follows from the fields that were given.

        Args:
            kept_elsewhere: keys that are no fields; those that are read here for good are taken out.

        Raises:
            ValueError: for a field whose value no model can have.
        """
        check_fields(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_heads
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_heads
        if self.lru_width is None and self.has_lru:
            self.lru_width = self.n_embd
        self.n_layers = self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
        # Published configs give the padded size of the vocabulary, and some give their rope in older keys.
        self.vocab_size = kept_elsewhere.pop("padded_vocab_size", None) or self.vocab_size
        theta = kept_elsewhere.get("rope_theta") or self.rope_base
        if self.rope_parameters is None and not kept_elsewhere.get("rope_scaling"):
            self.rope_parameters = {"rope_type": "default", "rope_theta": float(theta)}
        published_state = kept_elsewhere.pop("state_init", None)
        if published_state is not None and self.initial_state_mode == "noise":
            self.initial_state_mode = published_state
        std = (2 / (5 * self.n_embd)) ** 0.5
        effective_depth = (
            self.n_layers_in_prelude + self.n_layers_in_coda + self.n_layers_in_recurrent_block * self.mean_recurrence
        )
        published_start = {
            "std": std,
            "out_proj": std / (2 * effective_depth) ** 0.5,
            "embedding": std,
            "embed_scale": self.n_embd**0.5,
        }
        self.init_values = published_start | (self.init_values or {})

    @property
    def embed_scale(self) -> float:
        """Factor on the token embedding."""
        assert self.init_values is not None
        return self.init_values["embed_scale"]

    @property
    def default_num_steps(self) -> int:
        """The depth to run when none is given: the config's own, the calibrated one, or the one it was trained for."""
        if self.num_steps is not None:
            return self.num_steps
        return self.depth_profile["num_steps"] if self.depth_profile is not None else self.mean_recurrence

    def layer_type(self, layer: int) -> str:
        """Mixer of unique layer `layer`, counted through prelude, core and coda."""
        return self.layer_types[layer] if self.layer_types is not None else "full_attention"

    @property
    def has_lru(self) -> bool:
        """Whether any layer is recurrent in time."""
        return self.layer_types is not None and LRU_LAYER in self.layer_types

    def layer_has_rope(self, layer: int) -> bool:
        """Whether unique layer `layer` rotates its queries and keys."""
        return self.rope_layers[layer] if self.rope_layers is not None else True

    def validate_architecture(self) -> None:
        """Raise ValueError for a config that no model can have, and give s_0 its plain name.

        transformers calls it again before it saves, `from_pretrained` after it overrode fields.
        """
        check_fields(self)
        check_rope(self.rope_parameters, self.rope_types)
        if self.initial_state_mode not in STATE_MODES:
            raise UserError(
                f"initial_state_mode is {self.initial_state_mode!r}; redepth knows {', '.join(STATE_MODES)}"
            )
        self.initial_state_mode = STATE_MODES[self.initial_state_mode]
        if self.n_layers_in_recurrent_block < 1:
            raise UserError(
                f"n_layers_in_recurrent_block is {self.n_layers_in_recurrent_block}, but the core needs at least 1 layer"
            )
        if self.num_key_value_heads and self.n_heads % self.num_key_value_heads:
            raise UserError(
                f"n_heads ({self.n_heads}) is not a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.qk_bias and self.num_key_value_heads not in (None, self.n_heads):
            raise UserError(
                f"qk_bias is true, but num_key_value_heads ({self.num_key_value_heads}) is not n_heads ({self.n_heads}); "
                "the published bias has one row for each query head, so switch it off"
            )
        if self.head_dim and self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, but rotary positions need an even number")
        for name in ("layer_types", "rope_layers"):
            values = getattr(self, name)
            if values is not None and len(values) != self.n_layers:
                raise UserError(f"{name} has {len(values)} entries, but the model has {self.n_layers} unique layers")
        known = ("full_attention", "sliding_attention", LRU_LAYER)
        unknown = [kind for kind in self.layer_types or () if kind not in known]
        if unknown:
            raise UserError(f"layer_types holds {unknown[0]!r}, but a layer's type is one of {', '.join(known)}")
        if self.layer_types is not None and "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("layer_types names sliding_attention, but sliding_window is not set; set it in tokens")
        if self.has_lru and (not self.lru_width or self.lru_width % self.n_heads):
            raise UserError(f"lru_width ({self.lru_width}) is not a multiple of n_heads ({self.n_heads})")
