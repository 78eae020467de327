"""Attention over a context. Legend: B batch, L tokens, S context tokens, D width, H heads, K head width."""

import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Tokens attend to a context through scaled dot products, scale K^-0.5.

    The parameters are ``to_q``, ``to_k``, ``to_v`` (H * K, ...) without bias and ``to_out.0`` with bias.
    """

    def __init__(
        self, query_dim: int, context_dim: int, heads: int = 8, head_dim: int = 64, device=None, dtype=None
    ):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(query_dim, inner, bias=False, device=device, dtype=dtype)
        self.to_k = nn.Linear(context_dim, inner, bias=False, device=device, dtype=dtype)
        self.to_v = nn.Linear(context_dim, inner, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim, device=device, dtype=dtype))

    def forward(self, x_BLD: Tensor, context_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, S, D') -> (B, L, D); ``mask_BS`` is True where a context token may be read."""
        q = self.to_q(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(context_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(context_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))
