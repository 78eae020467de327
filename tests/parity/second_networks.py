"""Second fixtures of the networks, by the definitions; see make_second_fixtures.py."""

import importlib
from collections.abc import Callable

import torch

from dis_mamba import BiMambaMixer
from tests.parity import definitions as define
from tests.parity.second_processes import Maker
from zigflow.official import FAMILIES, official_arguments

NETWORKS = {
    "dit": define.dit, "sit": define.dit, "uvit": define.uvit, "uvit_t2i": define.uvit, "dis": define.dis,
    "dim": define.dim_network,
}  # fmt: skip


def random_state(family: str, kwargs: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of the names and shapes of a family's model, float32."""
    torch.manual_seed(seed)
    module, _, name = FAMILIES[family].target.rpartition(".")
    implied = {"split_skip": kwargs["attention_head_dim"] > 512} if family == "dim" else {}
    model = getattr(importlib.import_module(module), name)(
        **{**implied, **official_arguments(family, kwargs)}
    )
    state = {}
    for key, value in model.state_dict().items():
        drawn = torch.randn(value.shape) * (0.2 if value.ndim > 1 else 0.1)
        if key.endswith(("_log", "norm.weight", "norm_f.weight", "norm1.weight", "norm2.weight")):
            drawn = drawn * 0.3 + (1 if "norm" in key else 0)
        state[key] = drawn
    return state


def traced(network: Callable, state: dict, x: torch.Tensor, weight_of, *rest):
    """Output, weights of the sum and gradients of x and of some parameters, in float64."""
    p = {k: v.double().requires_grad_() for k, v in state.items()}
    x = x.double().requires_grad_()
    out = network(p, x, *rest)
    weight = weight_of(out)
    (out * weight.double()).sum().backward()
    grads = {k: v.grad.float() for k, v in p.items() if v.grad is not None and v.grad.abs().max() > 0}
    return out.detach(), weight, x.grad.float(), grads


def model_fixture(maker: Maker, name: str, family: str, kwargs: dict, y, *, times, size, extra=None) -> None:
    """A "{family}.model" in the layout of its folder; for DiT, SiT and DiS also the guided call."""
    network = NETWORKS[family]
    published = dict(kwargs)
    state = random_state(family, kwargs, maker.seed(name))
    x = torch.randn(len(times), *size)

    def run(p, x, t, y):
        out = network(p, published, x, t, y.double() if family == "uvit_t2i" else y)
        return out[:, : size[0]] if family == "sit" else out

    t = torch.tensor(times)
    out, weight, grad_x, grads = traced(run, state, x, lambda o: torch.randn(o.shape), t, y)
    dotted = family in ("dis", "dim")
    prefix, kind = ("param." if dotted else "state."), f"{family}.model"
    tensors = {prefix + k: v for k, v in state.items()}
    tensors |= {"in.x": x, "in.t": t, ("out" if dotted else "out.forward"): out.float()}
    tensors["grad_weight" if dotted else "w"] = weight
    tensors["grad.in.x" if dotted else "grad.x"] = grad_x
    if family in ("dit", "sit"):
        grads.pop("pos_embed")  # frozen
    elif family == "dim":
        tensors["out_f64"] = out
    tensors |= {f"grad.param.{k}": v for k, v in list(grads.items())[::3]}
    if y is not None:
        tensors["in.context" if family == "uvit_t2i" else "in.y"] = y
    meta = {"fixture_kind": kind, "kwargs": kwargs, **(extra or {})}
    if dotted:
        meta["param_count"] = sum(v.numel() for v in state.values())
    if family in ("dit", "sit", "dis") and y is not None:
        half = torch.randint(0, kwargs["num_classes"], (2,))
        doubled = torch.cat([half, torch.full_like(half, kwargs["num_classes"])])
        wide, late = torch.randn(4, *size), torch.tensor([*times[:2], *times[:2]])
        p = {k: v.double() for k, v in state.items()}
        scale = 1.3
        guided = define.guided_dit(
            lambda x, t, y: run(p, x.double(), t, y), wide, late, doubled, scale
        ).float()
        if family == "dit":
            tensors |= {"cfg.in.x": wide, "cfg.in.t": late, "cfg.in.y": doubled, f"cfg.out.{scale}": guided}
            table = define.sincos_table(kwargs["input_size"] // kwargs["patch_size"], kwargs["hidden_size"])
            tensors["init.pos_embed_sincos"] = table[None].float()
        elif family == "sit":
            tensors |= {"in.cfg_x": wide, "in.cfg_t": late, "in.cfg_y": doubled, "out.cfg": guided}
            meta["cfg_scale"] = scale
        else:
            tensors |= {"cfg.in.x": wide, "cfg.in.t": late, "cfg.in.y": doubled, "cfg.out": guided}
            meta["cfg"] = {"scale": scale, "rule": "the first three channels"}
    maker.write(name, meta, tensors, listed=dotted)


DIM_BASE = {
    "norm_type": "ada_norm_single", "patch_size": 2, "mamba_d_state": 3, "mamba_d_conv": 2, "mamba_expand": 2,
    "mamba_type": "enc", "is_uconnect": True, "no_ff": True, "is_extra_tokens": True, "rms": True,
    "use_pad_token": True, "use_a4m_adapter": True, "encoder_start_blk_id": 1, "use_adapter_modules": True,
    "pad_token_schedules": ["dec_split", "lateral"], "pos_encoding_type": "learnable", "scan_pattern_len": 3,
    "attention_head_dim": 6, "num_attention_heads": 2, "num_layers": 5, "in_channels": 2, "out_channels": 2,
    "num_embeds_ada_norm": 4, "sample_size": 6,
}  # fmt: skip
DIM_CHANGES = {
    "learned": {"out_channels": 4, "mlp_time_embed": True},
    "noskip": {"is_uconnect": False, "use_final_conv": True, "scan_pattern_len": 0},
    "three_paths": {"scan_pattern_len": 2, "num_layers": 9, "pad_token_len": 1},
    "all_paths": {"scan_pattern_len": 6, "num_layers": 11, "pad_token_schedules": ["rho_pad"]},
    "two_paths": {"scan_pattern_len": 1, "encoder_start_blk_id": 3, "num_layers": 9, "tkn_conv_dilated_rate": 2},
    "defaults": {
        "tkn_conv_dilated_rate": 1, "is_doubel_extra_tokens": False, "ff_dim_mult": 4, "pad_token_len": None,
        "use_final_conv": False, "drop_rate": 0, "nocat": False, "num_patches": [9], "in_channels": 1,
        "out_channels": None,
    },
}  # fmt: skip


def networks(maker: Maker) -> None:
    for name, changes in DIM_CHANGES.items():
        kwargs = {**DIM_BASE, **changes}
        chain = define.dim_chain(
            kwargs["num_layers"], kwargs["encoder_start_blk_id"], max(kwargs["scan_pattern_len"], 0)
        )
        model_fixture(
            maker, f"dim_{name}", "dim", kwargs, torch.tensor([1, 4]), times=[17.5, 900.0],
            size=(kwargs["in_channels"], 6, 6), extra={"scan_pattern_chain": chain, "split_skip_forced": False},
        )  # fmt: skip
    dis = {"img_size": 6, "patch_size": 3, "embed_dim": 10, "depth": 3, "channels": 2, "num_classes": 3}
    model_fixture(maker, "dis_two_channels", "dis", dis, torch.tensor([0, 3]), times=[3, 998], size=(2, 6, 6),
                  extra={"num_blocks": 3, "suggested_tol": {"out_abs": 1e-6, "grad_rel": 1e-4}})  # fmt: skip
    odd = {**dis, "num_classes": -1, "channels": 1, "learn_sigma": False, "mlp_time_embed": False, "embed_dim": 9,
           "rms_norm": False, "norm_epsilon": 1e-3, "ssm_cfg": {"d_state": 3, "expand": 1}, "skip": False}  # fmt: skip
    model_fixture(maker, "dis_plain", "dis", odd, None, times=[3, 998, 10], size=(1, 6, 6))
    dit = {"input_size": 6, "patch_size": 3, "in_channels": 2, "hidden_size": 24, "depth": 1, "num_heads": 3,
           "num_classes": 4, "mlp_ratio": 1.5}  # fmt: skip
    model_fixture(
        maker, "dit_two_channels", "dit", dit, torch.tensor([0, 4, 2]), times=[3, 998, 10], size=(2, 6, 6)
    )
    sit = {**dit, "in_channels": 5, "learn_sigma": False, "patch_size": 2, "hidden_size": 16, "num_heads": 2}
    model_fixture(maker, "sit_plain", "sit", sit, torch.tensor([0, 4]), times=[0.25, 0.875], size=(5, 6, 6))
    uvit = {"img_size": 6, "patch_size": 3, "in_chans": 2, "embed_dim": 10, "depth": 5, "num_heads": 2, "mlp_ratio": 3,
            "qkv_bias": False, "mlp_time_embed": True, "conv": True, "skip": False, "qk_scale": None,
            "use_checkpoint": False}  # fmt: skip
    model_fixture(maker, "uvit_noskip", "uvit", {**uvit, "num_classes": 3}, torch.tensor([0, 2]), times=[3, 998],
                  size=(2, 6, 6))  # fmt: skip
    text = {**uvit, "clip_dim": 7, "num_clip_token": 3, "skip": True, "conv": False, "qkv_bias": True}
    model_fixture(
        maker, "uvit_text", "uvit_t2i", text, torch.randn(2, 3, 7), times=[3.5, 998.0], size=(2, 6, 6)
    )
    zigma_model(maker)
    mixer(maker)


def zigma_model(maker: Maker) -> None:
    """Three directions of the zigzag, LayerNorm, labels."""
    kwargs = {"in_channels": 1, "img_dim": 6, "embed_dim": 12, "depth": 4, "patch_size": 2, "scan_type": "zigzagN3",
              "use_pe": 2, "num_classes": 3, "rms_norm": False, "norm_epsilon": 1e-3, "ssm_cfg": {"d_state": 3},
              "initializer_cfg": None, "device": "cuda"}  # fmt: skip
    side = 3
    snake = [i * side + (j if i % 2 == 0 else side - 1 - j) for i in range(side) for j in range(side)]
    turned = [k % side * side + k // side for k in snake]
    right = [i * side + (side - 1 - j if i % 2 == 0 else j) for i in range(side) for j in range(side)]
    paths = [snake, turned, right]
    orders = [paths[i % 3] for i in range(4)]
    state = random_state("zigma", kwargs, maker.seed("zigma_layernorm"))
    x, t, y = torch.randn(2, 1, 6, 6), torch.tensor([0.125, 0.75]), torch.tensor([2, 0])
    network = lambda p, x, t, y: define.zigma(p, kwargs, orders, x, t, y)  # noqa: E731
    out, w, grad_x, grads = traced(network, state, x, lambda o: torch.randn(o.shape), t, y)
    inverse = [[order.index(k) for k in range(len(order))] for order in orders]
    tensors = {f"param/{k}": v for k, v in state.items()} | {"in/x": x, "in/t": t, "in/y": y, "in/w": w}
    tensors |= {"out_f64": out, "out": out.float(), "grad/x": grad_x} | {
        f"grad/{k}": v for k, v in list(grads.items())[::4]
    }
    maker.write("zigma_layernorm", {
        "fixture_kind": "zigma.model", "ctor_kwargs": kwargs, "scan_type": "zigzagN3", "st_order": None,
        "temporal_inverse_corrected": True, "n_params": sum(v.numel() for v in state.values()), "non_trainable": [],
        "param_order": list(state), "per_layer_gather_before_mixer": orders, "per_layer_gather_after_mixer": inverse,
        "out_stats": {"mean": out.mean().item(), "std": out.std().item(), "absmax": out.abs().max().item()},
    }, tensors)  # fmt: skip


def mixer(maker: Maker) -> None:
    """The bidirectional mixer with an inner width, a rank and taps of its own."""
    kwargs = {
        "d_model": 6,
        "bimamba_type": "v2",
        "d_state": 2,
        "d_conv": 3,
        "expand": 3,
        "dt_rank": 2,
        "layer_idx": 1,
    }
    torch.manual_seed(maker.seed("mixer"))
    shapes = BiMambaMixer(6, d_state=2, d_conv=3, expand=3, dt_rank=2).state_dict()
    state = {k: 0.3 * torch.randn(v.shape) for k, v in shapes.items()}
    network = lambda p, x: define.mamba({f"m.{k}": v for k, v in p.items()}, "m", x)  # noqa: E731
    x = torch.randn(2, 7, 6)
    out, w, grad_x, grads = traced(network, state, x, lambda o: torch.randn(o.shape))
    tensors = {f"param.{k}": v for k, v in state.items()} | {"in.x": x, "out": out.float(), "grad_weight": w}
    tensors |= {"grad.in.x": grad_x} | {f"grad.param.{k}": v for k, v in grads.items()}
    maker.write("mixer", {"fixture_kind": "dis.mixer", "kwargs": kwargs}, tensors)
