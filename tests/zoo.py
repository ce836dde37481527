"""Tiny random checkpoints of every family, in odd sizes: what redepth must convert exactly."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 101
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# (model class, config class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 3, "head_dim": 10}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 7}),
    "mistral-full": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 6}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 14}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 12}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 9,
            "layer_types": ["sliding_attention"] * 2
            + ["full_attention"]
            + ["sliding_attention"] * 2
            + ["full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {"num_key_value_heads": 3}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {"no_rope_layers": [1, 1, 0, 1, 0, 1], "tie_word_embeddings": True},
    ),
    "griffin": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"intermediate_size": 74, "lru_width": 30, "attention_window_size": 6},
    ),
    "griffin-attention-first": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            "intermediate_size": 52,
            "num_key_value_heads": 3,
            "attention_window_size": 4,
            "block_types": ["attention", "recurrent"],
            "conv1d_width": 1,
            "logits_soft_cap": 2.0,
        },
    ),
    "hawk": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"intermediate_size": 60, "lru_width": 12, "conv1d_width": 3, "block_types": ["recurrent"]},
    ),
}


def make_model(name: str, **changes: Any) -> Any:
    """A seeded random model with norms and biases away from their start, so that no tensor's place is free."""
    model_class, config_class, differences = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, config_class)(**COMMON | differences | changes)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if config.model_type == "recurrent_gemma":
                # Its published start is so narrow that layers hardly matter.
                parameter.copy_(0.25 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def save_source(name: str, folder: Path, **changes: Any) -> Path:
    make_model(name, **changes).save_pretrained(folder)
    return folder


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the padding token 0."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
