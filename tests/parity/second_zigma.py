"""Second fixtures of ZigMa's training and checkpoints, by the definitions; see make_second_fixtures.py."""

import math

import torch
from omegaconf import OmegaConf

from tests.parity import definitions as define
from tests.parity.second_networks import random_state
from tests.parity.second_processes import Maker


def dropped_paths(maker: Maker) -> None:
    """Five bidirectional blocks, labels, another rate and other samples that are kept."""
    depth, rate, batch = 5, 0.25, 3
    kwargs = {"in_channels": 1, "img_dim": 4, "embed_dim": 8, "depth": depth, "patch_size": 2, "scan_type": "v2",
              "use_pe": 2, "num_classes": 2, "drop_path_rate": rate}  # fmt: skip
    state = random_state("zigma", kwargs, maker.seed("dropped"))
    # Rates of blocks 0, 1, 2, ... and of the last norm; rate 0 is no call.
    rates = [0.0, *(rate * i / (depth - 1) for i in range(depth - 1)), rate]
    rates = [r for r in rates if r > 0]
    keep = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]]).float()
    factors = [1.0, 1.0, *(k.reshape(-1, 1, 1) / (1 - r) for k, r in zip(keep, rates, strict=True))]
    x, t, y = torch.randn(batch, 1, 4, 4), torch.tensor([0.125, 0.5, 0.75]), torch.tensor([1, 0, 1])
    p = {k: v.double() for k, v in state.items()}
    out = define.zigma(p, kwargs, [list(range(4))] * depth, x.double(), t, y, factors)
    maker.write("dropped", {
        "fixture_kind": "zigma.drop_path", "ctor_kwargs": kwargs, "drop_probs_in_call_order": rates,
    }, {f"param/{k}": v for k, v in state.items()} | {
        "in/x": x, "in/t": t, "in/y": y, "keep_masks": keep, "out": out.float(),
    })  # fmt: skip


def checkpoint(maker: Maker) -> None:
    """A file of the published layout of another step, without DistributedDataParallel's prefix, with labels."""
    kwargs = {"in_channels": 2, "img_dim": 4, "embed_dim": 6, "depth": 2, "patch_size": 2, "scan_type": "zigzagN1",
              "use_pe": 0, "num_classes": 3, "rms_norm": False}  # fmt: skip
    average, trained = (random_state("zigma", kwargs, maker.seed(name)) for name in ("average", "trained"))
    args = {"model": {"params": kwargs}, "data": {"image_size": 32}}
    torch.save({
        "model": trained, "ema": average, "opt": {"state": {}, "param_groups": []}, "args": OmegaConf.create(args),
        "train_steps": 250, "best_fid": 12.5,
    }, maker.folder / "0000250.pt")  # fmt: skip
    x, t, y = torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 0.875]), torch.tensor([2, 0, 1])
    p = {k: v.double() for k, v in average.items()}
    # The first zigzag over 2 x 2 patches.
    out = define.zigma(p, kwargs, [[0, 1, 3, 2]] * 2, x.double(), t, y)
    maker.write("checkpoint", {
        "fixture_kind": "zigma.checkpoint", "checkpoint": "0000250.pt", "ctor_kwargs": kwargs,
    }, {"in/x": x, "in/t": t, "in/y": y, "out_ema": out.float()})  # fmt: skip


def optimizer_steps(maker: Maker) -> None:
    """Two steps on labels along another path of the transport, clipped before the step, with every other number."""
    kwargs = {"in_channels": 1, "img_dim": 4, "embed_dim": 8, "depth": 1, "patch_size": 2, "scan_type": "zigzagN1",
              "use_pe": 2, "num_classes": 3}  # fmt: skip
    state = random_state("zigma", kwargs, maker.seed("zigma_steps"))
    p = {k: v.double().requires_grad_() for k, v in state.items()}
    lr, decay, betas, eps, kept, limit = 2e-3, 0.1, (0.8, 0.95), 1e-6, 0.75, 0.5
    adam = torch.optim.AdamW(p.values(), lr=lr, weight_decay=decay, betas=betas, eps=eps)
    average, tensors, losses, norms = {k: v.detach().clone() for k, v in p.items()}, {}, [], []
    for step in range(2):
        x1, x0, t, y = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.rand(2), torch.randint(3, (2,))
        angle = 0.5 * math.pi * t.double().reshape(-1, 1, 1, 1)
        x_t = angle.sin() * x1 + angle.cos() * x0
        target = 0.5 * math.pi * (angle.cos() * x1 - angle.sin() * x0)
        loss = ((define.zigma(p, kwargs, [[0, 1, 3, 2]], x_t, t, y) - target) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.stack([v.grad.norm() for v in p.values() if v.grad is not None]).norm()
        for v in p.values():
            v.grad = None if v.grad is None else v.grad * min(1.0, limit / norm.item())
        adam.step()
        average = {k: kept * v + (1 - kept) * p[k].detach() for k, v in average.items()}
        losses, norms = [*losses, loss.item()], [*norms, norm.item()]
        tensors |= {f"step{step}/{k}": v for k, v in {"x1": x1, "x0": x0, "t": t, "y": y}.items()}
    tensors |= {f"param0/{k}": v for k, v in state.items()}
    tensors |= {f"final/{k}": v.float() for k, v in p.items()} | {
        f"ema/{k}": v.float() for k, v in average.items()
    }
    maker.write("zigma_steps", {
        "fixture_kind": "zigma.train_steps", "ctor_kwargs": kwargs, "lr": lr, "weight_decay": decay,
        "betas": list(betas), "eps": eps, "ema_decay": kept, "max_grad_norm": limit, "order": "clip_before",
        "losses": losses, "grad_norms_before_clip": norms, "drop_path_rate": 0.0,
        "note": "transport GVP/velocity; clipped before the step",
    }, tensors)  # fmt: skip


ZIGMA = (dropped_paths, checkpoint, optimizer_steps)
