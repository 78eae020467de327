"""Second fixtures of optimizer steps, sampled networks and initialization; see make_second_fixtures.py."""

import math

import torch

from tests.parity import definitions as define
from tests.parity.second_networks import NETWORKS, model_fixture, random_state
from tests.parity.second_processes import Maker, linear_betas, sd_bars, spread


def stepped(maker: Maker) -> None:
    """Optimizer steps of DiT with a fixed variance and of U-ViT without labels, in float64."""
    dit = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 2,
           "num_classes": 3, "class_dropout_prob": 0.0, "learn_sigma": False}  # fmt: skip
    uvit = {
        "img_size": 4,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "conv": False,
    }
    bars = {"dit": torch.cumprod(1 - linear_betas(1000), 0), "uvit": sd_bars()}
    for family, kwargs, count, decay in (("dit", dit, 2, 0.9), ("uvit", uvit, 4, 0.5)):
        torch.manual_seed(maker.seed(f"steps_{family}"))
        state = random_state(family, kwargs, 1)
        p = {k: v.double().requires_grad_(k != "pos_embed" or family == "uvit") for k, v in state.items()}
        trained = [v for v in p.values() if v.requires_grad]
        optimizer = {"lr": 1e-3, "weight_decay": 2.0, "betas": [0.8, 0.9], "eps": 1e-7}
        adam = torch.optim.AdamW(trained, lr=1e-3, weight_decay=2.0, betas=(0.8, 0.9), eps=1e-7)
        average, tensors, warmup = {k: v.detach().clone() for k, v in p.items()}, {}, 3
        for step in range(count):
            n, x1, x0 = torch.randint(1, 1000, (2,)), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
            y = torch.tensor([0, 2]) if family == "dit" else None
            bar = bars[family][n - 1].reshape(-1, 1, 1, 1)
            x_t = bar.sqrt() * x1 + (1 - bar).sqrt() * x0
            fed = n - 1 if family == "dit" else n
            loss = ((NETWORKS[family](p, kwargs, x_t, fed, y) - x0) ** 2).mean((1, 2, 3))
            adam.zero_grad()
            loss.mean().backward()
            stored = {"x0": x1, "noise": x0, "loss": loss.float()}
            if family == "dit":
                stored |= {"t": fed, "y": y, "mse": loss.float()}
                stored["gradnorm"] = torch.stack([v.grad.norm() for v in trained]).norm().float()
            else:
                adam.param_groups[0]["lr"] = 1e-3 * min(step / warmup, 1)
                stored |= {"n": n, "lr_after": torch.tensor(1e-3 * min((step + 1) / warmup, 1)).double()}
            adam.step()
            average = {k: decay * v + (1 - decay) * p[k].detach() for k, v in average.items()}
            tensors |= {f"step{step}.{k}": v for k, v in stored.items()}
        # Not of biases: a key's has no gradient but rounding, which Adam scales to whole steps.
        names = [k for k in p if k.endswith(("attn.qkv.weight", "fc1.weight"))]
        tensors |= {f"state.{k}": v for k, v in state.items()}
        tensors |= {f"final.{k}": p[k].float() for k in names} | {
            f"ema.{k}": average[k].float() for k in names
        }
        meta = {
            "fixture_kind": f"{family}.train_steps",
            "kwargs": kwargs,
            "optimizer": optimizer,
            "ema_decay": decay,
        }
        maker.write(f"steps_{family}", meta | ({"warmup_steps": warmup} if family == "uvit" else {}), tensors)


def sampled(maker: Maker) -> None:
    """DDIM through a stored DiT without guidance; DDIM and the loss of a DiS without labels."""
    dit = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 8, "depth": 1, "num_heads": 2,
           "num_classes": 3, "learn_sigma": False}  # fmt: skip
    model_fixture(maker, "dit_sampled", "dit", dit, torch.tensor([0, 3]), times=[3, 998], size=(4, 4, 4))
    bars, kept = torch.cumprod(1 - linear_betas(1000), 0), spread(1000, 4)
    state = {k: v.double() for k, v in random_state("dit", dit, maker.seed("dit_sampled")).items()}
    torch.manual_seed(2)
    z, y, noise = torch.randn(4, 4, 4, 4), torch.tensor([0, 2, 3, 3]), torch.randn(4, 4, 4, 4, 4)
    guided = lambda x, t: define.guided_dit(lambda x, t, y: define.dit(state, dit, x, t, y), x, t, y, 2.5)  # noqa: E731
    maker.write("dit_end", {"fixture_kind": "dit.end_to_end", "state_from": "dit_sampled", "respacing": "4",
                            "cfg_scale": 2.5, "kind": "ddim", "eta": 0.0, "clip_denoised": True}, {
        "z": z, "y": y, "noise": noise, "samples": ddim(guided, z.double(), bars, kept, True).float(),
    })  # fmt: skip
    dis = {"img_size": 4, "patch_size": 2, "embed_dim": 8, "depth": 2, "channels": 1, "num_classes": -1,
           "learn_sigma": False}  # fmt: skip
    state = random_state("dis", dis, 5)
    p, kept = {k: v.double() for k, v in state.items()}, [0, 334, 668]
    net = lambda x, t: define.dis(p, dis, x, t)  # noqa: E731
    x1, x0, t, start = (
        torch.randn(3, 1, 4, 4),
        torch.randn(3, 1, 4, 4),
        torch.tensor([0, 500, 999]),
        torch.randn(3, 1, 4, 4),
    )
    bar = bars[t].reshape(-1, 1, 1, 1)
    x_t = bar.sqrt() * x1 + (1 - bar).sqrt() * x0
    loss = ((net(x_t, t) - x0) ** 2).mean((1, 2, 3)).float()
    betas = linear_betas(1000)
    maker.write("dis_ddim", {
        "fixture_kind": "dis.diffusion", "kwargs": dis, "respacing": "ddim3", "timestep_map": kept,
        "beta_check": [betas[0].item(), betas[-1].item()], "alphas_cumprod_check": {"3": bars[3].item()},
    }, {f"param.{k}": v for k, v in state.items()} | {
        "in.x0": x1, "in.noise": x0, "in.t": t, "x_t": x_t.float(), "loss.loss": loss, "loss.mse": loss,
        "sample.z": start, "sample.noises": torch.randn(3, *start.shape),
        "out.ddim": ddim(net, start.double(), bars, kept)[-1].float(),
    })  # fmt: skip


def ddim(network, x: torch.Tensor, bars: torch.Tensor, kept: list[int], clip: bool = False) -> torch.Tensor:
    """The states (K, B, ...) after each of the ``kept`` steps of DDIM without noise, the data clipped or not."""
    states = []
    for place in reversed(range(len(kept))):
        bar, after = bars[kept[place]], bars[kept[place - 1]] if place else torch.ones(()).double()
        eps = network(x, torch.full((len(x),), kept[place]))
        data = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        data = data.clamp(-1, 1) if clip else data
        x = after.sqrt() * data + (1 - after).sqrt() * (x - bar.sqrt() * data) / (1 - bar).sqrt()
        states.append(x)
    return torch.stack(states)


def drawn(maker: Maker) -> None:
    """The published initialization of DiT by its formula: uniform in +-sqrt(6 / (in + out)), normals of 0.02."""
    side, patch, channels, dim, hidden, classes = 3, 2, 3, 40, 60, 7
    table = define.sincos_table(side, dim)

    def xavier(rows: int, columns: int) -> dict:
        return {"shape": [rows, columns], "mean": 0.0, "std": math.sqrt(2 / (rows + columns))}

    def zero(*shape: int) -> dict:
        return {"shape": list(shape), "mean": 0.0, "std": 0.0}

    def normal(*shape: int) -> dict:
        return {"shape": list(shape), "mean": 0.0, "std": 0.02}

    final = patch**2 * channels
    fan = math.sqrt(2 / (dim + channels * patch**2))
    stats = {
        "pos_embed": {"shape": [1, side**2, dim], "mean": table.mean().item(), "std": table.std().item()},
        "x_embedder.proj.weight": {"shape": [dim, channels, patch, patch], "mean": 0.0, "std": fan},
        "x_embedder.proj.bias": zero(dim),
        "t_embedder.mlp.0.weight": normal(dim, 256), "t_embedder.mlp.0.bias": zero(dim),
        "t_embedder.mlp.2.weight": normal(dim, dim), "t_embedder.mlp.2.bias": zero(dim),
        "y_embedder.embedding_table.weight": normal(classes + 1, dim),
        "blocks.0.attn.qkv.weight": xavier(3 * dim, dim), "blocks.0.attn.qkv.bias": zero(3 * dim),
        "blocks.0.attn.proj.weight": xavier(dim, dim), "blocks.0.attn.proj.bias": zero(dim),
        "blocks.0.mlp.fc1.weight": xavier(hidden, dim), "blocks.0.mlp.fc1.bias": zero(hidden),
        "blocks.0.mlp.fc2.weight": xavier(dim, hidden), "blocks.0.mlp.fc2.bias": zero(dim),
        "blocks.0.adaLN_modulation.1.weight": zero(6 * dim, dim), "blocks.0.adaLN_modulation.1.bias": zero(6 * dim),
        "final_layer.linear.weight": zero(final, dim), "final_layer.linear.bias": zero(final),
        "final_layer.adaLN_modulation.1.weight": zero(2 * dim, dim),
        "final_layer.adaLN_modulation.1.bias": zero(2 * dim),
    }  # fmt: skip
    stats = {k: {**v, "requires_grad": k != "pos_embed"} for k, v in stats.items()}
    maker.write("dit_drawn", {"fixture_kind": "dit.init_stats", **stats})
