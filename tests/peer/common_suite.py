"""transformers' common model tests on both model classes: `make test-peer TRANSFORMERS=DIR`.

The name of this file keeps it out of the tests that run offline, without a checkout.
"""

import unittest
from typing import Any

import torch

from redepth import (
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    RecurrentDepthForSequenceClassification,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaModel,
    RecurrentStack,
)
from tests.peer.checkout import GENERATION_TESTS, MODEL_TESTS, mixin

ModelTests = mixin(MODEL_TESTS, "ModelTesterMixin")
GenerationTests = mixin(GENERATION_TESTS, "GenerationTesterMixin")


class Tester:
    """Sizes, a configuration and inputs, under the names by which the suite asks for them."""

    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 37
    num_attention_heads = 2
    num_key_value_heads = 2
    num_hidden_layers = 3
    is_training = True

    def get_config(self) -> Any:
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Ids `[B, T]` without the special tokens, and a mask of ones."""
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    # The ids of the special tokens, and what both configurations call by the same name.
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class DepthTester(Tester):
    num_steps = 2

    def get_config(self) -> RecurrentDepthConfig:
        return RecurrentDepthConfig(
            **self.common,
            n_embd=self.hidden_size,
            n_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            n_layers_in_prelude=1,
            n_layers_in_recurrent_block=1,
            n_layers_in_coda=1,
            mean_recurrence=self.num_steps,
            mean_backprop_depth=self.num_steps,
            block_size=512,
            tie_embeddings=False,
        )


class GemmaTester(Tester):
    def get_config(self) -> RecurrentGemmaConfig:
        return RecurrentGemmaConfig(
            **self.common,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=2 * self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            attention_window_size=16,
        )


class TestRecurrentDepth(ModelTests, GenerationTests, unittest.TestCase):
    all_model_classes = (RecurrentStack, RecurrentDepthForCausalLM, RecurrentDepthForSequenceClassification)
    has_attentions = False  # a core layer has one attention map for each step

    def setUp(self) -> None:
        self.model_tester = DepthTester()


class TestRecurrentGemma(ModelTests, GenerationTests, unittest.TestCase):
    all_model_classes = (RecurrentGemmaModel, RecurrentGemmaForCausalLM)
    has_attentions = False  # two of three layers are recurrent

    def setUp(self) -> None:
        self.model_tester = GemmaTester()
