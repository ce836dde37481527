"""Configuration of a depth-recurrent language model, in the published `huginn_raven` format, for transformers."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .fields import GROUP_MODULES, RecurrentDepthFields

logger = logging.get_logger(__name__)


class RecurrentDepthConfig(RecurrentDepthFields, PreTrainedConfig):
    """The fields of `fields.RecurrentDepthFields`, which says what each means, as transformers' configuration."""

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ["past_key_values", "latent_states", "stats"]
    # Outputs are gathered where queries, keys and values, or gate and up, lie side by side in one product and are split.
    base_model_tp_plan = {
        **{
            f"{part}.*.{name}": "colwise_gather_output"
            for part in GROUP_MODULES.values()
            for name in ("attn.Wqkv", "mlp.fc")
        },
        **{
            f"{part}.*.{name}": "rowwise_split_input"
            for part in GROUP_MODULES.values()
            for name in ("attn.proj", "mlp.proj")
        },
    }

    rope_types = (*RecurrentDepthFields.rope_types, *ROPE_INIT_FUNCTIONS)

    def __post_init__(self, **kwargs: Any) -> None:
        self.derive(kwargs)
        if kwargs.get("test_time_noise"):
            logger.warning(f"test_time_noise={kwargs['test_time_noise']} is not added to states here; none is")
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the longest text under transformers' own name as well.

        Where this class is not known, as for a tokenizer, the file is read as a plain configuration, and that one looks
        for the name to check a rope that was stretched.
        """
        return super().to_dict() | {"max_position_embeddings": self.block_size}
