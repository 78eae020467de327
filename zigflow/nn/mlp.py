"""The token-wise part of a transformer block. Legend: B batch, L tokens, D width, F hidden width."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, Linear; the parameters are ``fc1`` (F, D) and ``fc2`` (D, F).

    ``approximate`` is that of ``nn.GELU``: "tanh" in DiT, "none" (exact) in U-ViT.
    """

    def __init__(self, dim: int, hidden: int, approximate: str = "none", device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(self.act(self.fc1(x_BLD)))
