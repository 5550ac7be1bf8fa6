"""The architecture of UltraRM: a Llama model with one linear head on the state of the last token."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

# How its training data were written.
TEMPLATE = "Human: {prompt}\nAssistant: {response}"
# This weight, (1, hidden_size), marks such a checkpoint, whatever its config calls the class.
HEAD = "regression_head.weight"


class LlamaRegressionModel(LlamaPreTrainedModel):
    """r(text) = w . o_T, with o_T the last hidden state (after the final norm) of the last token that is not padding (Cui et al. 2023, UltraFeedback)."""

    def __init__(self, config: Any):
        # Its checkpoints do not say so, and two is what a config says by default.
        config.num_labels = 1
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> SequenceClassifierOutputWithPast:
        """`logits` of (batch, 1), one reward a text, from (batch, tokens) ids and a mask, 1 for a token and 0 for padding on whichever side."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # The count of tokens grows until the last one, and argmax takes the first of equal counts.
        last = mask.cumsum(dim=1).argmax(dim=1)
        return SequenceClassifierOutputWithPast(logits=self.regression_head(hidden[torch.arange(len(hidden), device=hidden.device), last]))
