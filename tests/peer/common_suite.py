"""transformers' common model tests on both model classes: `make test-peer TRANSFORMERS=DIR`.

The name of this file keeps it out of the tests that run offline, without a checkout.
"""

import unittest
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

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

# The suite tells from these lists which labels a class takes, if any. RecurrentGemma's names are in them already.
for names, model_class in (
    (MODEL_MAPPING_NAMES, RecurrentStack),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, RecurrentDepthForCausalLM),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, RecurrentDepthForSequenceClassification),
):
    names[RecurrentDepthConfig.model_type] = model_class.__name__


class Tester:
    """Sizes, a configuration and inputs, under the names by which the suite asks for them."""

    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 37
    num_attention_heads = 2
    num_key_value_heads = 2
    num_hidden_layers = 2
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
    expected_num_hidden_layers = 5  # hidden states: the embedding, and each layer as often as it is run

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
            block_types=("recurrent", "attention"),
            attention_window_size=16,
        )


class CommonTests(ModelTests, GenerationTests):
    """The suite's flags that hold for both models."""

    @property
    def has_attentions(self) -> bool:
        """Whether the model returns attention maps as the suite expects them, which neither does by design.

        RecurrentDepth has a map for each step and returns none; RecurrentGemma has them in some layers, and only with
        eager attention. The suite asks the same flag whether eager and sdpa can be compared: they can.
        """
        return self._testMethodName.startswith("test_eager_matches_sdpa")

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """The suite's own check is of one key a layer and token; here a core layer may have one for each step, and others
        none, so the tokens are counted alone."""
        assert past_key_values.get_seq_length() == seq_length


class TestRecurrentDepth(CommonTests, unittest.TestCase):
    all_model_classes = (RecurrentStack, RecurrentDepthForCausalLM, RecurrentDepthForSequenceClassification)

    def setUp(self) -> None:
        self.model_tester = DepthTester()


class TestRecurrentGemma(CommonTests, unittest.TestCase):
    all_model_classes = (RecurrentGemmaModel, RecurrentGemmaForCausalLM)

    def setUp(self) -> None:
        self.model_tester = GemmaTester()
