"""Attention over a context and of tokens over themselves.

Legend: B batch, L tokens, S context tokens, D width, H heads, K head width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import RMSNorm
from .positions import rotate


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

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x_BLD: Tensor, context_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, S, D') -> (B, L, D); ``mask_BS`` is True where a context token may be read."""
        q = self.to_q(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(context_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(context_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Every token attends to every token through scaled dot products, scale K^-0.5, in the dtype of the products.

    The parameters are ``qkv`` (3 D, D), rows ordered [q | k | v] and head-major inside, and ``proj`` (D, D); with
    ``qk_norm`` also ``q_norm.weight`` and ``k_norm.weight`` (K,), an RMS norm of each head's queries and keys
    (Henry et al. 2020; Dehghani et al. 2023).

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = True, qk_norm: bool = False, device=None, dtype=None
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"num_heads={heads} does not divide the width {dim}: choose a divisor of it")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = RMSNorm(dim // heads, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(dim // heads, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(
        self, x_BLD: Tensor, rotations_2LK: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        ``rotations_2LK`` turns queries and keys by their positions (see ``axial_rotations``); ``mask_BL`` is True
        where a token may be read.
        """
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotations_2LK is not None:
            q, k = rotate(q, rotations_2LK).to(v.dtype), rotate(k, rotations_2LK).to(v.dtype)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))
