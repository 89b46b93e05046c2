"""FluxFlow's text encoder: DistilBERT, the mean over its states, and a head with Bezier activations.

The head's name is misspelt in the published files, and so here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel

from musubi_tuner.models.fluxflow.bezier import BezierActivation

HEAD = 512
"""Width between the two halves of the head."""
PUBLISHED = {"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "max_position_embeddings": 512,
             "dropout": 0.1, "attention_dropout": 0.1, "activation": "gelu"}  # fmt: skip
"""distilbert-base-uncased."""


class TextEncoder(nn.Module):
    """Token ids to text states and a pooled vector.

    Args:
        distilbert: geometry of the language model. embed_dim: E.
        compat: with ``reference`` the mean runs over padding too.
    """

    def __init__(self, distilbert: Mapping[str, Any] = PUBLISHED, embed_dim: int = 1024, compat: str = "fixed") -> None:
        super().__init__()
        self.compat = compat
        self.language_model = DistilBertModel(DistilBertConfig(**distilbert))
        self.ouput_layer = nn.Sequential(
            nn.Linear(self.language_model.config.dim, 5 * HEAD),
            nn.LayerNorm(5 * HEAD),
            BezierActivation("sigmoid", "none"),
            nn.Linear(HEAD, 5 * embed_dim),
            nn.LayerNorm(5 * embed_dim),
            BezierActivation("sigmoid", "none"),
        )

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States of the language model [B, L, dim] for ids [B, L] and a mask [B, L] of what is no padding."""
        trains = any(parameter.requires_grad for parameter in self.language_model.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            found: Tensor = self.language_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found

    def pool(self, states: Tensor, attention_mask: Tensor, compat: str | None = None) -> Tensor:
        """Text vectors [B, E] of states."""
        if (compat or self.compat) == "reference":
            return self.ouput_layer(states.mean(dim=1))
        mask = attention_mask.to(states.dtype)[..., None]
        return self.ouput_layer((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, compat: str | None = None) -> Tensor:
        """Text vectors [B, E].

        Args:
            input_ids: int64 [B, L]. attention_mask: [B, L], 1 = no padding. compat: None = that of the model.
        """
        return self.pool(self.states(input_ids, attention_mask), attention_mask, compat)
