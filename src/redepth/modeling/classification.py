"""A head that classifies whole texts, transformers' own over the stack. It needs redepth: nothing of it travels."""

from transformers.modeling_layers import GenericForSequenceClassification

from .pretrained import RecurrentDepthPreTrainedModel


class RecurrentDepthForSequenceClassification(GenericForSequenceClassification, RecurrentDepthPreTrainedModel):
    """Logits `[B, num_labels]` of each row's last token; takes the keywords of `DepthPolicy` as the language model does."""

    base_model_prefix = RecurrentDepthPreTrainedModel.base_model_prefix
