"""What a model is told beside the noisy image. Legend: B batch, S tokens, D width."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dis_kernels.dispatch import transform_reason
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

    def extra_repr(self) -> str:
        return f"{self.num_classes} classes, dropout_prob={self.dropout_prob}"

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


def check_labels(labels_B: Tensor, num_classes: int, has_null: bool) -> None:
    """Name a label that the table has no row for, where looking at the values costs no device transfer.

    Raises:
        ValueError: a label outside 0..num_classes - 1, or ..num_classes with a null class.
    """
    if torch.compiler.is_compiling() or type(labels_B) is not Tensor or labels_B.device.type != "cpu":
        return
    if transform_reason((labels_B,)) is not None:
        return
    smallest, largest = int(labels_B.min()), int(labels_B.max())
    if smallest < 0 or largest >= num_classes + has_null:
        null = f", or {num_classes} for no class" if has_null else ""
        more = f", or build it with num_classes={largest + 1} or more" if largest >= num_classes else ""
        raise ValueError(
            f"the labels run from {smallest} to {largest}, this model has num_classes={num_classes}: give "
            f"labels 0..{num_classes - 1}{null}{more}"
        )


def read_labels(
    y, batch: int, num_classes: int, dropout_prob: float, training: bool, device: torch.device
) -> Tensor:
    """The class labels (B,) of a condition, in training some of them replaced by the null class.

    The null class is ``num_classes``; it exists with ``dropout_prob`` > 0, and also stands for ``y`` = None.

    Raises:
        ValueError: no labels where the model has no null class, another shape or type, a label without a row.
    """
    if isinstance(y, Condition):
        y = y.labels
    if y is None and dropout_prob > 0:
        y = torch.full((batch,), num_classes, dtype=torch.int64, device=device)
    if not isinstance(y, Tensor) or y.shape != (batch,) or y.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else y
        raise ValueError(f"this model reads class labels: y must be integers ({batch},), got {given}")
    check_labels(y, num_classes, dropout_prob > 0)
    if training and dropout_prob > 0:
        y = torch.where(dropped_conditions(dropout_prob, batch, device), num_classes, y)
    return y


def check_mask(mask_BS: Tensor | None, tokens_BSD: Tensor) -> None:
    """Numbers in the place of a mask would be added to the attention's scores.

    Raises:
        ValueError: another shape or type than one bool per token.
    """
    if mask_BS is not None and (mask_BS.dtype != torch.bool or mask_BS.shape != tokens_BSD.shape[:2]):
        raise ValueError(
            f"a text's mask is bool {tuple(tokens_BSD.shape[:2])}, True where a token counts, got "
            f"{tuple(mask_BS.shape)} {mask_BS.dtype}"
        )


def read_text(
    y, batch: int, d_context: int, null_text_SD: Tensor | None, dropout_prob: float, training: bool
) -> tuple[Tensor, Tensor | None]:
    """The text tokens (B, S, d_context) of a condition and their mask; in training some texts become the null text.

    With a null text every text has its S tokens, and ``y`` = None stands for it.

    Raises:
        ValueError: no tokens where the model has no null text, tokens of another shape, or a mask that does not say
            yes or no of every token.
    """
    mask_BS = None
    if isinstance(y, Condition):
        y, mask_BS = y.tokens, y.mask
    if null_text_SD is not None and y is None:
        return null_text_SD.expand(batch, -1, -1), None
    wanted = (batch, y.shape[1] if y is not None and y.dim() == 3 else -1, d_context)
    if null_text_SD is not None:
        wanted = (batch, *null_text_SD.shape)
    if y is None or tuple(y.shape) != wanted:
        given = None if y is None else tuple(y.shape)
        tokens = "S" if null_text_SD is None else null_text_SD.shape[0]
        raise ValueError(
            f"this model reads text: y must be tokens ({batch}, {tokens}, {d_context}), got {given}"
        )
    check_mask(mask_BS, y)
    if null_text_SD is not None and training:
        dropped_B = dropped_conditions(dropout_prob, batch, y.device)
        y = torch.where(dropped_B[:, None, None], null_text_SD.to(y.dtype), y)
        # The null text counts whole, however short the text was that it replaces.
        mask_BS = None if mask_BS is None else mask_BS | dropped_B[:, None]
    return y, mask_BS


def null_condition(y, num_classes: int, null_text_SD: Tensor | None):
    """The condition that stands for "none", built like ``y``: labels (B,), tokens (B, S, D') or a ``Condition``.

    Of a ``Condition`` the part that the model reads is replaced: with ``null_text_SD`` the tokens, which then count
    whole in the mask, else the labels.

    Raises:
        ValueError: a ``Condition`` lacks the part that is replaced.
    """
    if isinstance(y, Condition):
        part = "labels" if null_text_SD is None else "tokens"
        value = getattr(y, part)
        if value is None:
            raise ValueError(
                f"this model reads {part}, and the Condition has none: give Condition({part}=...)"
            )
        changed = {part: null_condition(value, num_classes, null_text_SD)}
        if part == "tokens" and y.mask is not None:
            changed["mask"] = torch.ones_like(y.mask)
        return replace(y, **changed)
    if null_text_SD is None:
        return torch.full_like(y, num_classes)
    null = null_text_SD.detach()
    # Outside of the forward pass a sharded parameter is a shard; every process asks equally often.
    gather = getattr(null, "full_tensor", None)
    null = null if gather is None else gather()
    return null.to(y).expand(y.shape[0], -1, -1)


NO_NULL = (
    "this model has no null condition, so guidance cannot be used: train it with class_dropout_prob > 0 (it adds the "
    "null class or text), or sample with guidance scale 1"
)
