"""RecurrentGemma as DeepMind publishes it for torch: one `.pt` file of tensors, beside it perhaps `tokenizer.model`.

Names and shapes are those of the package `recurrentgemma` 1.0.1 (github.com/google-deepmind/recurrentgemma).
"""

import pickle
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GemmaTokenizer, GenerationConfig, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from redepth.errors import RedepthError, first_line

from .sources import Source

# The file holds only tensors. What they do not show is the same in all models published in this form.
WINDOW, SOFT_CAP = 2048, 30.0
LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
OUTER = {"embedder.input_embedding": "model.embed_tokens.weight", "final_norm.scale": "model.final_norm.weight"}
# transformers' name within a layer ← DeepMind's, where the tensor is the same.
SAME = {
    "temporal_pre_norm.scale": "temporal_pre_norm.weight",
    "channel_pre_norm.scale": "channel_pre_norm.weight",
    "attention_block.proj_q.weight": "temporal_block.q_proj.weight",
    "attention_block.proj_k.weight": "temporal_block.k_proj.weight",
    "attention_block.proj_v.weight": "temporal_block.v_proj.weight",
    "attention_block.proj_final.weight": "temporal_block.o_proj.weight",
    "attention_block.proj_final.bias": "temporal_block.o_proj.bias",
    "recurrent_block.linear_y.weight": "temporal_block.linear_y.weight",
    "recurrent_block.linear_y.bias": "temporal_block.linear_y.bias",
    "recurrent_block.linear_x.weight": "temporal_block.linear_x.weight",
    "recurrent_block.linear_x.bias": "temporal_block.linear_x.bias",
    "recurrent_block.linear_out.weight": "temporal_block.linear_out.weight",
    "recurrent_block.linear_out.bias": "temporal_block.linear_out.bias",
    "recurrent_block.conv_1d.b": "temporal_block.conv_1d.bias",
    "recurrent_block.rg_lru.a_param": "temporal_block.rg_lru.recurrent_param",
    "recurrent_block.rg_lru.input_gate.w": "temporal_block.rg_lru.input_gate_weight",
    "recurrent_block.rg_lru.input_gate.b": "temporal_block.rg_lru.input_gate_bias",
    "recurrent_block.rg_lru.a_gate.w": "temporal_block.rg_lru.recurrent_gate_weight",
    "recurrent_block.rg_lru.a_gate.b": "temporal_block.rg_lru.recurrent_gate_bias",
    "mlp_block.ffw_down.weight": "mlp_block.down_proj.weight",
    "mlp_block.ffw_down.bias": "mlp_block.down_proj.bias",
}
# The others: gate and up are one tensor, gate first, and matrices are transposed.
CHANGED: dict[str, list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]] = {
    "recurrent_block.conv_1d.w": [("temporal_block.conv_1d.weight", lambda w: w.T[:, None])],
    "mlp_block.ffw_up.w": [
        ("mlp_block.gate_proj.weight", lambda w: w[0].T),
        ("mlp_block.up_proj.weight", lambda w: w[1].T),
    ],
    "mlp_block.ffw_up.b": [
        ("mlp_block.gate_proj.bias", lambda b: b[0].flatten()),
        ("mlp_block.up_proj.bias", lambda b: b[1].flatten()),
    ],
}


class DeepMindSource(Source):
    """One `.pt` file of the package `recurrentgemma`, read without running code."""

    license = "gemma"

    def __init__(self, name: str, file: Path) -> None:
        super().__init__(name, file.parent)
        self.location = self._file = file

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        """Tensors by DeepMind's names, on disk until they are read."""
        try:
            stored = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise RedepthError(f"{self._file} is not a readable .pt file of tensors: {first_line(error)}") from None
        needed = ("embedder.input_embedding", "blocks.0.mlp_block.ffw_down.weight", "final_norm.scale")
        for tensor in needed:
            if not isinstance(stored, dict) or not isinstance(stored.get(tensor), torch.Tensor):
                raise RedepthError(
                    f"source {self.name!r} holds no tensor {tensor!r}, so it is no RecurrentGemma in DeepMind's layout; "
                    "give other models as a folder that transformers wrote"
                )
        return stored

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
        """What makes each of transformers' tensors: DeepMind's, and a change of its shape."""
        found: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {}
        for name in self._stored:
            layer = LAYER.fullmatch(name)
            if layer is None:
                # An unknown name is kept, and the weight table reports it.
                found[OUTER.get(name, name)] = name, lambda tensor: tensor
                continue
            number, within = layer.groups()
            for target, change in CHANGED.get(within, [(SAME.get(within, within), lambda tensor: tensor)]):
                found[f"model.layers.{number}.{target}"] = name, change
        return found

    @cached_property
    def config(self) -> RecurrentGemmaConfig:
        stored = self._stored
        num_layers = 1 + max(int(match.group(1)) for match in map(LAYER.fullmatch, stored) if match is not None)
        types = [
            "recurrent" if f"blocks.{layer}.recurrent_block.linear_y.weight" in stored else "attention"
            for layer in range(num_layers)
        ]
        vocabulary, width = stored["embedder.input_embedding"].shape
        try:
            if "recurrent" in types:
                block = f"blocks.{types.index('recurrent')}.recurrent_block"
                heads = stored[f"{block}.rg_lru.a_gate.w"].shape[0]
                lru_width = stored[f"{block}.rg_lru.a_param"].shape[0]
                taps = stored[f"{block}.conv_1d.w"].shape[0]
            else:
                heads, lru_width, taps = width // stored["blocks.0.attention_block.proj_k.weight"].shape[0], width, 4
        except KeyError as error:
            raise RedepthError(f"source {self.name!r} lacks tensor {error.args[0]!r}; is the file whole?") from None
        period = next(p for p in range(1, num_layers + 1) if all(types[i] == types[i % p] for i in range(num_layers)))
        return RecurrentGemmaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * stored["blocks.0.mlp_block.ffw_down.weight"].shape[1],
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=1,
            lru_width=lru_width,
            conv1d_width=taps,
            block_types=types[:period],
            # DeepMind's code counts the tokens before the current one, transformers' counts the current one too.
            attention_window_size=WINDOW + 1,
            logits_soft_cap=SOFT_CAP,
            dtype=self.dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._stored["embedder.input_embedding"].dtype

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        stored, change = self._tensors[name]
        return change(self._stored[stored]).clone(memory_format=torch.contiguous_format)

    @cached_property
    def tokenizer(self) -> Any | None:
        if not (self.folder / "tokenizer.model").exists() or (self.folder / "tokenizer.json").exists():
            return super().tokenizer
        try:
            return GemmaTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, ImportError) as error:
            raise RedepthError(
                f"{self.folder / 'tokenizer.model'} can't be read without sentencepiece ({first_line(error)}); run pip "
                "install sentencepiece, or move the file away to convert without a tokenizer"
            ) from None

    def generation_config(self) -> GenerationConfig:
        return GenerationConfig.from_model_config(self.config)

    def reference_model(self) -> Any:
        tensors = {name: self.read(name).float() for name in self.tensor_names()}
        options: dict[str, Any] = {"config": self.config, "state_dict": tensors, "output_loading_info": True}
        loaded: Any = RecurrentGemmaForCausalLM.from_pretrained(None, dtype=torch.float32, **options)
        model, report = loaded
        if report["missing_keys"]:
            raise RedepthError(f"source {self.name!r} lacks tensor {min(report['missing_keys'])!r}")
        return model.eval()
