"""What a model is told beside the noisy image. Legend: B batch, S tokens, D width."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zigflow.keyed import current_draws


@dataclass(frozen=True)
class Condition:
    """A condition with several parts; a model reads the parts that it was built for.

    labels: (B,) int64 · tokens: (B, S, D') · mask: (B, S), True where a token counts · pooled: (B, D'').
    """

    labels: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None


class LabelEmbedder(nn.Module):
    """Class labels to vectors; the parameter is ``embedding_table.weight``.

    With ``dropout_prob`` > 0 the table has one more row, the null class ``num_classes``, which replaces
    labels at random in training and stands for "no class" in guidance. With 0 there is no such row.
    """

    def __init__(
        self, num_classes: int, hidden_size: int, dropout_prob: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        rows = num_classes + (1 if dropout_prob > 0 else 0)
        self.embedding_table = nn.Embedding(rows, hidden_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels_B: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        """(B,) -> (B, D); rows where ``dropped_B`` is True get the null class."""
        if dropped_B is not None:
            labels_B = torch.where(dropped_B, self.num_classes, labels_B)
        return self.embedding_table(labels_B)


def dropped_conditions(probability: float, batch: int, device: torch.device) -> Tensor:
    """(B,) bool: whose condition is replaced by the null condition in this training step.

    The draw follows the ambient ``KeyedDraws`` when one is active, else torch's generator.
    """
    draws = current_draws()
    u_B = torch.rand(batch, device=device) if draws is None else draws.uniform("condition_dropout").to(device)
    return u_B < probability
