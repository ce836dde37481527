"""What the stack and the language model share as transformers' models: names, loading, and the published start."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .blocks import Attention
from .configuration import RecurrentDepthConfig
from .elementwise import RMSNorm
from .lru_mixer import GATE_VARIANCE, RGLRU
from .published import complete_config
from .published_kinds import Kind
from .quantizer import DepthQuantizationConfig
from .state import StateGate, gate_start

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class RecurrentDepthPreTrainedModel(PreTrainedModel):
    """Names, loading and initialisation."""

    config_class = RecurrentDepthConfig
    config: RecurrentDepthConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    # The published kind that the checkpoint was found to be; None where its config says its switches itself.
    published_kind: Kind | None = None
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"freqs_cis"]

    def __init__(self, config: RecurrentDepthConfig) -> None:
        if config.attn_logit_softcapping is not None:
            self._supports_sdpa = False
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; where a published config does not say which kind it is, the tensor names complete it.

        `quantization_config` may also be one of redepth's by its name, such as `int8`.

        Raises:
            ValueError: for a checkpoint that fits no published kind, naming the tensors.
        """
        if isinstance(kwargs.get("quantization_config"), str):
            kwargs["quantization_config"] = DepthQuantizationConfig.named(kwargs["quantization_config"])
        where = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **where)
            # num_labels is a property, and not in the dictionary.
            for key in set(kwargs) & (set(config.to_dict()) | {"num_labels"}) - {"dtype"}:
                setattr(config, key, kwargs.pop(key))
            config.validate_architecture()
        kind = None
        if pretrained_model_name_or_path is not None:
            kind = complete_config(config, pretrained_model_name_or_path, **where)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.published_kind = kind
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published start: normal cut at ±3 std, output projections and the mlp's up half narrower by depth."""
        assert self.config.init_values is not None
        std, narrow = self.config.init_values["std"], self.config.init_values["out_proj"]

        def cut_normal(weight: torch.Tensor, deviation: float) -> None:
            init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)

        if isinstance(module, nn.Embedding):
            cut_normal(module.weight, self.config.init_values["embedding"])
        elif isinstance(module, RMSNorm):
            init.zeros_(module.weight) if module.one_plus else init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            start = getattr(module, "fresh_start", "plain")
            cut_normal(module.weight, narrow if start == "narrow" else std)
            if start == "up half narrow" and not getattr(module.weight, "_is_hf_initialized", False):
                cut_normal(module.weight.chunk(2)[1], narrow)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Attention) and self.config.qk_bias:
            init.zeros_(module.qk_bias)
        elif isinstance(module, StateGate):
            init.copy_(module.weight, gate_start(len(module.weight)))
        elif isinstance(module, RGLRU):
            module.fresh_start(GATE_VARIANCE)
        elif isinstance(module, nn.Conv1d):
            cut_normal(module.weight, (GATE_VARIANCE / self.config.conv1d_width) ** 0.5)
            assert module.bias is not None
            init.zeros_(module.bias)
