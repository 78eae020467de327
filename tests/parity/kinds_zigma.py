"""Checks of the fixture kinds zigma.model, zigma.ops, zigma.drop_path, zigma.checkpoint and zigma.init_stats."""

import re

import torch

from dis_causal_conv1d import causal_conv1d
from dis_mamba import selective_scan
from model_zigma import ZigMa
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from zigflow.keyed import _Active
from zigflow.nn import CrossAttention, LayerNorm, RMSNorm, sincos_positions, sinusoidal_embedding
from zigflow.official import load_official, official_arguments, read_official


def _load(fixture: Fixture, prefix="param/", **ours):
    kwargs = fixture.meta["ctor_kwargs"].plain()
    corrected = fixture.meta.get("temporal_inverse_corrected", False)
    if "video" in kwargs.get("scan_type", ""):
        ours["official_temporal_reversal"] = not corrected
    return load_official("zigma", kwargs, fixture.under(prefix), **ours)


@parity_kind("zigma.model", cases=lambda f: ["float32", "float64"] if "out_f64" in f.tensors else ["float32"])
def check_model(fixture: Fixture, case: str) -> None:
    model = _load(fixture)
    dtype = getattr(torch, case)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixture.under("in/").items()}
    x = inputs["x"].requires_grad_()
    activations = {}

    def keep(**take):
        def hook(module, args, out):
            activations.update({name: pick(args, out) for name, pick in take.items()})

        return hook

    model.x_embedder.register_forward_hook(
        keep(patch_embed=lambda args, out: out.reshape(x.shape[0], -1, out.shape[-1]))
    )
    model.blocks[0].register_forward_hook(keep(block0_in=lambda args, out: args[0] + args[1]))
    model.blocks[0].register_forward_hook(
        keep(block0_x=lambda args, out: out[0], block0_residual=lambda args, out: out[1])
    )
    walk = model.orders.at(model.token_grid, x.device)[0]

    def raster(y):
        """The published mixer gathers inside; ours works on tokens in scan order."""
        y = y.reshape(x.shape[0], -1, y.shape[-1])
        return y if walk.undo is None else y[:, walk.undo]

    model.blocks[0].mixer.register_forward_hook(
        keep(mixer0_in=lambda args, out: raster(args[0]), mixer0_out=lambda args, out: raster(out))
    )
    model.t_embedder.register_forward_hook(keep(t_emb=lambda args, out: out))
    model.norm_f.register_forward_hook(keep(final_layer_in=lambda args, out: out))

    out = model(x, inputs["t"], y=inputs.get("y"))
    assert out.shape == x.shape
    check_description(fixture, model, out)
    if case == "float64":
        assert_close("out_f64", out, fixture.tensors["out_f64"], of_max=1e-9)
        return
    floor = max(4 * fixture.meta.get("max_abs_err_out_f32_vs_f64", 0.0), fixture.tolerance())
    assert_close("out", out, fixture.tensors["out"], floor=floor)
    stored = fixture.under("act/")
    unchecked = set(stored) - set(activations)
    assert not unchecked, f"{fixture.path.name} stores activations that nothing compares: {sorted(unchecked)}"
    for name, want in stored.items():
        assert_close(f"act/{name}", activations[name], want)
    (out * inputs["w"]).sum().backward()
    parameters = dict(model.named_parameters())
    errors = dict(fixture.meta.get("max_rel_err_grads_f32_vs_f64", {}))
    if "grad/x" not in fixture.tensors:
        return
    for name, want in fixture.under("grad/").items():
        got = x.grad if name == "x" else parameters[name].grad
        assert_close(f"grad/{name}", got, want, of_max=max(GRADIENT_RTOL_OF_MAX, 4 * errors.get(name, 0.0)))


def check_description(fixture: Fixture, model: ZigMa, out: torch.Tensor) -> None:
    """What the JSON says of the parameters, the output and every layer's gathers."""
    meta, parameters = fixture.meta, dict(model.named_parameters())
    if "n_params" in meta:
        assert sum(p.numel() for p in parameters.values()) == meta["n_params"]
    if "param_order" in meta:
        assert list(parameters) == meta["param_order"]
    if "non_trainable" in meta:
        assert [n for n, p in parameters.items() if not p.requires_grad] == meta["non_trainable"]
    if "scan_type" in meta:
        assert meta["scan_type"] == meta["ctor_kwargs"].get("scan_type", "v2")
    stats = dict(meta.get("out_stats", {}))
    if "out_absmax" in meta:
        stats["absmax"] = meta["out_absmax"]
    got = {"mean": out.mean(), "std": out.std(), "absmax": out.abs().max()}
    for name, want in stats.items():
        assert abs(got[name].item() - want) <= 1e-4 * got["absmax"].item(), name
    before, after = meta.get("per_layer_gather_before_mixer"), meta.get("per_layer_gather_after_mixer")
    kinds = meta.get("st_order")
    if before is None and after is None and kinds is None:
        return
    schedule = model.scan_spec.schedule(
        model.depth, *model.token_grid, official_temporal_reversal=model.official_temporal_reversal
    )
    for layer, step in enumerate(schedule):
        # "ststst...", of which a layer reads its own letter.
        if kinds is not None:
            assert step.fold == {"s": "frames", "t": "pixels"}[kinds[layer]], layer
        if before is not None:
            assert step.path.order.tolist() == before[layer], layer
            assert step.undo.order.tolist() == after[layer], layer


def _scan(t, variant):
    """The stored scan is channel-major (B, E, L); ours is token-major."""
    leaves = {k: t[f"scan/in/{k}"].clone().requires_grad_() for k in ("u", "A", "B", "C")}
    plain = variant == "noD_noz_nobias_nosoftplus"
    leaves["delta"] = (
        (t[f"scan/{variant}/delta_used"] if plain else t["scan/in/delta"]).clone().requires_grad_()
    )
    options = {}
    if not plain:
        leaves |= {k: t[f"scan/in/{k}"].clone().requires_grad_() for k in ("D", "delta_bias")}
        options = {"D": leaves["D"], "delta_bias": leaves["delta_bias"], "delta_softplus": True}
    if variant == "full":
        leaves["z"] = t["scan/in/z"].clone().requires_grad_()
        options["z"] = leaves["z"].transpose(1, 2)
    out = selective_scan(
        *(leaves[k].transpose(1, 2) for k in ("u", "delta")), leaves["A"],
        *(leaves[k].transpose(1, 2) for k in ("B", "C")), **options,
    )  # fmt: skip
    return out.transpose(1, 2), leaves


def _last_state(leaves, softplus: bool) -> torch.Tensor:
    """The state (B, E, N) behind the last token, read through a C that picks one state after the other."""
    A, B = leaves["A"], leaves["B"].transpose(1, 2)
    options = {"delta_bias": leaves["delta_bias"], "delta_softplus": True} if softplus else {}
    u, delta = (leaves[k].transpose(1, 2) for k in ("u", "delta"))
    picks = torch.eye(A.shape[1])
    return torch.stack(
        [selective_scan(u, delta, A, B, pick.expand_as(B).contiguous(), **options)[:, -1] for pick in picks],
        -1,
    )


@parity_kind("zigma.ops")
def check_ops(fixture: Fixture, case: str) -> None:
    t = fixture.tensors
    variants = [n for n in dict.fromkeys(k.split("/")[0] for k in fixture.names("scan/")) if n != "in"]
    for variant in variants:
        out, leaves = _scan(t, variant)
        assert_close(f"scan/{variant}/out", out, t[f"scan/{variant}/out"])
        (out * t["scan/in/w"]).sum().backward()
        for name, leaf in leaves.items():
            assert_close(
                f"{variant}/{name}", leaf.grad, t[f"scan/{variant}/grad_{name}"], of_max=GRADIENT_RTOL_OF_MAX
            )
        if f"scan/{variant}/last_state" in t:
            with torch.no_grad():
                got = _last_state(leaves, "delta_bias" in leaves)
            assert_close(f"{variant}/last_state", got, t[f"scan/{variant}/last_state"])

    for key in fixture.names("conv/out_"):
        out = causal_conv1d(
            t["conv/x"].transpose(1, 2), t["conv/weight"][:, 0], t["conv/bias"],
            activation={"silu": "silu", "noact": None}[key],
        )  # fmt: skip
        assert_close(key, out.transpose(1, 2), t[f"conv/out_{key}"])

    if "norm/x" in t:
        check_norms(fixture)
    for name in fixture.names("temb/"):
        if name != "t":
            dim = int(name.removeprefix("sin_"))
            assert_close(name, sinusoidal_embedding(t["temb/t"] * 1000, dim), t[f"temb/{name}"])
    for name in fixture.names("pos/"):
        side, dim = map(int, re.fullmatch(r"sincos_grid(\d+)_dim(\d+)", name).groups())
        assert_close(name, sincos_positions(side, side, dim)[0], t[f"pos/{name}"])
    if "xattn/out" in t:
        attention = CrossAttention(t["xattn/x"].shape[-1], t["xattn/text"].shape[-1])
        attention.load_state_dict(fixture.under("xattn/param/"))
        assert_close("xattn", attention(t["xattn/x"], t["xattn/text"]), t["xattn/out"])


def check_norms(fixture: Fixture) -> None:
    t, eps = fixture.tensors, fixture.setting("eps")
    rms, layer = (norm(len(t["norm/weight"]), eps=eps) for norm in (RMSNorm, LayerNorm))
    for norm in (rms, layer):
        norm.weight.data.copy_(t["norm/weight"])
    layer.bias.data.copy_(t["norm/bias"])
    stream = t["norm/x"] + t["norm/residual"]
    # The JSON does not say whether norm/bias belongs to the RMS norm; the values do, it does not (with it they are
    # off by 1.2), as in ZigMa, whose RMS norms have no bias.
    got = {
        "rms_residual_out": stream,
        "layer_residual_out": stream,
        "rms_out": rms(stream),
        "rms_out_nores": rms(t["norm/x"]),
        "layer_out": layer(stream),
        "layer_out_nores": layer(t["norm/x"]),
    }
    for name in fixture.names("norm/"):
        if name not in ("x", "residual", "weight", "bias"):
            assert_close(name, got[name], t[f"norm/{name}"])


class _StoredMasks:
    """Ambient draws that reproduce the stored keep decisions of the drop path calls."""

    def __init__(self, keep_NB, rates):
        self.keep_NB, self.dropping = keep_NB, torch.tensor([rate > 0 for rate in rates])

    def uniform(self, purpose, shape=(), **kwargs):
        assert purpose == "drop_path", purpose
        assert shape == self.dropping.shape, shape
        u = torch.zeros(self.keep_NB.shape[1], len(self.dropping))
        # What has rate 0 was not called: blocks 0 and 1, of which the first has no residual.
        u[:, self.dropping] = 1.0 - self.keep_NB.t().float()
        return u * 0.999


@parity_kind("zigma.drop_path")
def check_drop_path(fixture: Fixture, case: str) -> None:
    model = _load(fixture).train()
    rates = [r for r in model.drop_path_rates if r > 0]
    assert_close("rates", torch.tensor(rates), torch.tensor(fixture.meta["drop_probs_in_call_order"]))
    keep = fixture.tensors["keep_masks"]
    assert keep.shape[0] == len(rates)
    with _Active(_StoredMasks(keep, model.drop_path_rates)):
        out = model(*_inputs(fixture))
    assert_close("out", out, fixture.tensors["out"])


def _inputs(fixture: Fixture) -> tuple:
    t = fixture.tensors
    return t["in/x"], t["in/t"], t.get("in/y", None)


@parity_kind("zigma.checkpoint")
def check_checkpoint(fixture: Fixture, case: str) -> None:
    path = fixture.path.with_name(fixture.meta["checkpoint"])
    read = read_official(path, "zigma")
    assert read.ctor_kwargs == fixture.meta["ctor_kwargs"].plain()
    assert read.step == int(path.stem)
    model = load_official("zigma", read.ctor_kwargs, read.state_dict)
    assert_close("out_ema", model(*_inputs(fixture)), fixture.tensors["out_ema"])


@parity_kind("zigma.init_stats", cases=lambda f: [k for k in f.meta if "params" in (f.meta[k] or "")])
def check_init(fixture: Fixture, case: str) -> None:
    entry = fixture.meta[case]
    torch.manual_seed(0)
    model = ZigMa(**official_arguments("zigma", entry["ctor_kwargs"].plain(), official_backward_dt_init=True))
    state = dict(model.named_parameters())
    assert list(state) == list(entry["params"])
    for name, want in entry["params"].items():
        if "requires_grad" in want:
            assert state[name].requires_grad == want["requires_grad"], name
        check_statistics(name, state[name].detach(), want)
