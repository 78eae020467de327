"""What the tests of the transformer families share: tiny models whose zero-initialized layers are filled, and runs."""

from functools import partial

import torch

from model_zigma import ZigMa
from zigflow.keyed import KeyedDraws
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT

FAMILIES = {
    "zigma": partial(ZigMa, use_pe=2),
    "dis": DiS,
    "dim": DiM,
    "dit": partial(DiT, num_heads=2),
    "uvit": partial(UViT, num_heads=2),
}


def filled(model):
    """Draw every trainable parameter at a size that tells, so that nothing hides behind a small or zero one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            scale = 0.5 if name in ("pos_embed", "null_text") else 0.2
            if p.dim() > 1 and name not in ("pos_embed", "null_text"):
                scale = p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.dim() == 1 and "norm" in name))
    return model


def inputs(model, batch=2, size=None, seed=0):
    """(x, t, y) that the model reads."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.in_channels, *(size or model.img_dim), generator=generator)
    t = torch.rand(batch, generator=generator) * 999
    y = None
    if model.has_text:
        y = torch.randn(batch, model.n_context_token, model.d_context, generator=generator)
    elif model.num_classes > 0:
        y = torch.arange(batch) % model.num_classes
    return x, t, y


def run(model, batch=3):
    """The output and every gradient of its squared sum."""
    x, t, y = inputs(model, batch)
    x.requires_grad_()
    with KeyedDraws(0, torch.arange(batch)).active():
        out = model(x, t, y)
    out.square().sum().backward()
    gradients = {"x": x.grad.clone()} | {
        k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return out.detach(), gradients
