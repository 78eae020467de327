"""Checks of the fixture kinds zigma.model, zigma.ops, zigma.drop_path, zigma.checkpoint and zigma.init_stats."""

import torch

from dis_causal_conv1d import causal_conv1d
from dis_mamba import selective_scan
from model_zigma import ZigMa
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from zigflow.nn import CrossAttention, LayerNorm, RMSNorm, sincos_positions, sinusoidal_embedding
from zigflow.official import load_official, read_official


def _load(fixture: Fixture, prefix="param/", **ours):
    kwargs = dict(fixture.meta["ctor_kwargs"])
    if fixture.meta.get("scan_type", "").startswith("zzvideo"):
        ours["official_temporal_reversal"] = not fixture.meta["temporal_inverse_corrected"]
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
    walk = model._walks(model.grid, x.device)[0]

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
    if case == "float64":
        assert_close("out_f64", out, fixture.tensors["out_f64"], of_max=1e-9)
        return
    floor = 4 * fixture.meta.get("max_abs_err_out_f32_vs_f64", 0.0)
    assert_close("out", out, fixture.tensors["out"], floor=floor)
    stored = fixture.under("act/")
    unchecked = set(stored) - set(activations)
    assert not unchecked, f"{fixture.path.name} stores activations that nothing compares: {sorted(unchecked)}"
    for name, want in stored.items():
        assert_close(f"act/{name}", activations[name], want)
    (out * inputs["w"]).sum().backward()
    parameters = dict(model.named_parameters())
    errors = fixture.meta.get("max_rel_err_grads_f32_vs_f64", {})
    for name, want in fixture.under("grad/").items():
        got = x.grad if name == "x" else parameters[name].grad
        assert_close(f"grad/{name}", got, want, of_max=max(GRADIENT_RTOL_OF_MAX, 4 * errors.get(name, 0.0)))


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


@parity_kind("zigma.ops")
def check_ops(fixture: Fixture, case: str) -> None:
    t = fixture.tensors
    for variant in ("full", "noz", "noD_noz_nobias_nosoftplus"):
        out, leaves = _scan(t, variant)
        assert_close(f"scan/{variant}/out", out, t[f"scan/{variant}/out"])
        (out * t["scan/in/w"]).sum().backward()
        for name, leaf in leaves.items():
            assert_close(
                f"{variant}/{name}", leaf.grad, t[f"scan/{variant}/grad_{name}"], of_max=GRADIENT_RTOL_OF_MAX
            )

    for activation, key in (("silu", "out_silu"), (None, "out_noact")):
        out = causal_conv1d(
            t["conv/x"].transpose(1, 2), t["conv/weight"][:, 0], t["conv/bias"], activation=activation
        )
        assert_close(key, out.transpose(1, 2), t[f"conv/{key}"])

    rms, layer = RMSNorm(6), LayerNorm(6)
    for norm in (rms, layer):
        norm.weight.data.copy_(t["norm/weight"])
    layer.bias.data.copy_(t["norm/bias"])
    stream = t["norm/x"] + t["norm/residual"]
    assert_close("rms_residual_out", stream, t["norm/rms_residual_out"])
    # ops.json does not say whether norm/bias belongs to the RMS norm; the values do, it does not (with it they are
    # off by 1.2), as in ZigMa, whose RMS norms have no bias.
    assert_close("rms_out", rms(stream), t["norm/rms_out"])
    assert_close("rms_out_nores", rms(t["norm/x"]), t["norm/rms_out_nores"])
    assert_close("layer_out", layer(stream), t["norm/layer_out"])

    assert_close("temb", sinusoidal_embedding(t["temb/t"] * 1000, 256), t["temb/sin_256"])
    assert_close("pos4", sincos_positions(4, 4, 16)[0], t["pos/sincos_grid4_dim16"])
    assert_close("pos3", sincos_positions(3, 3, 24)[0], t["pos/sincos_grid3_dim24"])

    attention = CrossAttention(16, 16)
    attention.load_state_dict(fixture.under("xattn/param/"))
    assert_close("xattn", attention(t["xattn/x"], t["xattn/text"]), t["xattn/out"])


class _StoredMasks:
    """Ambient draws that reproduce the stored keep decisions of the drop path calls."""

    def __init__(self, keep_NB, layers):
        self.keep_NB, self.layers = keep_NB, layers

    def uniform(self, purpose, shape=(), **kwargs):
        assert purpose == "drop_path", purpose
        assert shape == (self.layers,), shape
        u = torch.zeros(self.keep_NB.shape[1], self.layers)
        # Blocks 0 and 1 have rate 0; the stored calls are those of blocks 2.. and the final one.
        u[:, 2:] = 1.0 - self.keep_NB.t().float()
        return u * 0.999


@parity_kind("zigma.drop_path")
def check_drop_path(fixture: Fixture, case: str) -> None:
    model = _load(fixture).train()
    rates = [r for r in model.drop_path_rates if r > 0]
    assert_close("rates", torch.tensor(rates), torch.tensor(fixture.meta["drop_probs_in_call_order"]))
    keep = fixture.tensors["keep_masks"]
    assert keep.shape[0] == len(rates)
    import zigflow.nn.drop_path as module

    stored = _StoredMasks(keep, len(model.drop_path_rates))
    original, module.current_draws = module.current_draws, lambda: stored
    try:
        out = model(fixture.tensors["in/x"], fixture.tensors["in/t"])
    finally:
        module.current_draws = original
    assert_close("out", out, fixture.tensors["out"])


@parity_kind("zigma.checkpoint")
def check_checkpoint(fixture: Fixture, case: str) -> None:
    read = read_official(fixture.path.with_name(fixture.meta["checkpoint"]), "zigma")
    assert read.ctor_kwargs == fixture.meta["ctor_kwargs"]
    assert read.step == 10
    model = load_official("zigma", read.ctor_kwargs, read.state_dict)
    out = model(fixture.tensors["in/x"], fixture.tensors["in/t"])
    assert_close("out_ema", out, fixture.tensors["out_ema"])


@parity_kind("zigma.init_stats", cases=lambda f: [k for k in f.meta if k != "fixture_kind"])
def check_init(fixture: Fixture, case: str) -> None:
    entry = fixture.meta[case]
    model = ZigMa(**entry["ctor_kwargs"], official_backward_dt_init=True)
    state = dict(model.named_parameters())
    assert list(state) == list(entry["params"])
    for name, want in entry["params"].items():
        check_statistics(name, state[name].detach(), want)
