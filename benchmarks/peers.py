"""What a ZigMa is timed against: its published arrangement, and other families at its width, tokens and parameters.

Equal parameters, not equal depth, is the fair comparison: a DiT block has twice the parameters of a ZigMa block of the
same width. So each family is as deep as brings its parameters nearest, with heads of 64 channels and its published MLP.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dis_mamba import MambaMixer
from dis_mamba.mixer import _Weights
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT

HEAD = 64


class PublishedMixer(MambaMixer):
    """The mixer with its scan order inside: both halves of in_proj's output are gathered, the result scattered.

    As published: an index takes the tokens, a concatenation appends extra ones, of which an image has none. But tokens
    stay before channels, as these kernels want them: channels first, every gather would cost several times more.
    """

    def __init__(self, d_model, *, order, inverse, **options):
        super().__init__(d_model, **options)
        self.order: Tensor
        self.inverse: Tensor
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, x_BLD):
        length = x_BLD.shape[1]
        xz = self.in_proj(x_BLD)
        xz = torch.cat([xz[:, self.order], xz[:, length:]], dim=1)
        x, z = xz.chunk(2, dim=-1)
        weights = _Weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        y = self._direction(x, weights, z=z)
        y = torch.cat([y[:, self.inverse], y[:, length:]], dim=1)
        return self.out_proj(y)


def _dis(depth, backend, num_heads, **options):
    # Blocks come in pairs around a middle one, here and in U-ViT.
    return DiS(
        depth=2 * (depth - 1), num_classes=0, class_dropout_prob=0.0, learn_sigma=False, drop_path_rate=0.0,
        ssm_cfg={"backend": backend}, **options,
    )  # fmt: skip


def _dim(depth, backend, num_heads, **options):
    return DiM(
        depth=2 * depth - 1, num_classes=0, class_dropout_prob=0.0, ssm_cfg={"backend": backend}, **options
    )


def _dit(depth, backend, **options):
    return DiT(depth=depth, class_dropout_prob=0.0, num_classes=0, learn_sigma=False, **options)


def _uvit(depth, backend, **options):
    return UViT(depth=2 * depth - 1, **options)


PEERS: dict[str, Callable[..., nn.Module]] = {"dis": _dis, "dim": _dim, "dit": _dit, "uvit": _uvit}


# One vector per token and no arithmetic: not what a fair comparison of work is about.
POSITIONS = ("pos_embed", "additional_embed")


def parameters(model: nn.Module) -> int:
    """How many, but for tables of positions."""
    return sum(p.numel() for name, p in model.named_parameters() if name.rpartition(".")[2] not in POSITIONS)


def build_peer(
    family: str, wanted: int, *, width: int, patch: int, side: int, backend: str, device: torch.device
) -> nn.Module:
    """The ``family`` of the given width for (4, side, side) latents, with about ``wanted`` parameters.

    ``backend`` is that of the scans, where there are any.
    """

    def build(depth, device):
        return PEERS[family](
            depth, backend, in_channels=4, embed_dim=width, img_dim=side, patch_size=patch,
            num_heads=max(1, width // HEAD), device=device,
        )  # fmt: skip

    # Parameters are a fixed number and one per depth.
    one, two = (parameters(build(depth, "meta")) for depth in (1, 2))
    depth = max(1, round((wanted - one) / (two - one)) + 1)
    return build(depth, device)
