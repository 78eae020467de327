"""DiS: manifests, variants, the stream and its skips, scans, official weights and files, precision."""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from dis_causal_conv1d import use_backend
from scans import get_scan
from tests.assertions import BF16_RELATIVE_RMS, assert_close, assert_relative_rms
from tests.models.transformers import filled, inputs
from zigflow import plugins
from zigflow.keyed import KeyedDraws
from zigflow.models import build_variant
from zigflow.models.dis import SIZES, DiS
from zigflow.nn.flops import count_flops
from zigflow.official import load_official, official_arguments, read_official
from zigflow.plugins import compose_config
from zigflow.preflight import check_training
from zigflow.processes import Flow
from zigflow.settings import SettingsError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "dis_dim" / "manifests"
MANIFESTS = sorted(FIXTURES.glob("DiS-*.json"))
TINY = {"in_channels": 2, "img_dim": (4, 6), "patch_size": 2, "embed_dim": 16, "depth": 4}
LABELS = {"num_classes": 3, "class_dropout_prob": 0.3}
NAMES = [f"dis_{size}_{patch}" for size in SIZES for patch in (2, 4)]


def tiny(**changes):
    torch.manual_seed(0)
    return filled(DiS(**{**TINY, **changes}))


def variant_of(manifest):
    return manifest["model"].replace("DiS-", "dis_").replace("/", "_").lower()


@functools.cache
def composed(name):
    return compose_config(["data=none", f"model={name}", "run_dir=unused"])["model"]


def configured(name):
    node = dict(composed(name))
    assert node.pop("name") == name
    assert node.pop("_target_") == "zigflow.models.dis.DiS"
    return node


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_names_shapes_and_totals_equal_the_manifest(path):
    manifest = json.loads(path.read_text())
    arguments = official_arguments("dis", manifest["kwargs"])
    with torch.device("meta"):
        model = DiS(**arguments)
    state = {k: list(p.shape) for k, p in model.state_dict().items()}
    assert list(state.items()) == list(manifest["shapes"].items())
    assert sum(p.numel() for p in model.parameters()) == manifest["total_params"]
    assert model.guided_channels == arguments.pop("guided_channels") == 3
    if path.stem.endswith("cond256"):
        # What model= composes is this model, but for the guidance.
        node = configured(variant_of(manifest))
        assert {key: node[key] for key in arguments} == arguments


def test_every_size_is_published():
    assert {variant_of(json.loads(path.read_text())) for path in MANIFESTS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_the_variants(name):
    node = configured(name)
    assert (node["embed_dim"], node["depth"]) == SIZES[name.split("_")[1]]
    with torch.device("meta"):
        own, variant = DiS(**{**node, "depth": 2}), build_variant(name, depth=2)
    assert str(own) == str(variant)
    assert own.out_channels == variant.out_channels == 8
    assert (own.img_dim, own.guided_channels) == (variant.img_dim, 4)


def test_operations_are_the_sum_of_thenamed_blocks():
    def counted(depth, **changes):
        return count_flops(DiS(**{**TINY, "depth": depth, **changes}))

    two, four, six = (counted(depth, skip=False).forward for depth in (2, 4, 6))
    assert 0 < six - four == four - two
    joined = counted(4).forward - four
    tokens, dim = 6 + 1, 16
    assert joined == 2 * (2 * tokens * 2 * dim * dim)


def test_nothing_is_done_token_by_token():
    """As many operations on 6 tokens as on 96, the orders of a scan included."""

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for size in ((4, 6), (16, 24)):
        with torch.device("meta"):
            model = DiS(**{**TINY, "img_dim": size}, scan="zigzag")
        with Counter() as counter, use_backend("torch"):
            model(torch.empty(2, 2, *size, device="meta"), torch.empty(2, device="meta"))
        counts.append(counter.operations)
    assert counts[0] == counts[1] > 50


@pytest.mark.parametrize("depth", [4, 5])
def test_there_is_an_odd_number_of_blocks(depth):
    model = DiS(**{**TINY, "depth": depth})
    assert list(model.named_blocks()) == [
        "in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1",
    ]  # fmt: skip


def watched(model, given):
    """What every block is given and gives: name -> (arguments, output)."""
    seen = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args, out)}))
        for name, block in model.named_blocks().items()
    ]
    model(*given)
    for hook in hooks:
        hook.remove()
    return seen


def test_skips_carry_what_the_mixers_give_and_join_before_the_stream():
    model = tiny().eval()
    seen = watched(model, inputs(model))
    assert seen["out_blocks.0"][0][2] is seen["in_blocks.1"][1][0]
    assert seen["out_blocks.1"][0][2] is seen["in_blocks.0"][1][0]
    assert seen["mid_block"][0][2] is None
    (hidden, residual, skip, *_), (out, stream) = seen["out_blocks.0"]
    block = model.out_blocks[0]
    joined = block.skip_linear(torch.cat([hidden, skip], dim=-1))
    assert_close("stream", stream, residual + joined, of_max=1e-6)
    assert_close("mixed", out, block.mixer(block.norm(residual + joined)), of_max=1e-6)
    assert not seen["in_blocks.0"][0][1].any(), "the stream starts at zero"
    assert not any("skip_linear" in name for name in DiS(**TINY, skip=False).state_dict())


def test_extra_tokens_stand_before_the_patches():
    model = tiny(**LABELS).eval()
    x, t, y = inputs(model)
    assert model.pos_embed.shape == (1, 2 + 6, 16)
    assert DiS(**TINY).pos_embed.shape == (1, 1 + 6, 16)
    tokens, c, grid = model._tokens(x, t, y)
    assert grid == (2, 3)
    label = model.label_emb(y)
    assert_close("label", tokens[:, 0], label + model.pos_embed[:, 0])
    assert_close("time", tokens[:, 1] - model.pos_embed[:, 1], c - label, of_max=1e-5)
    larger = model._tokens(torch.randn(2, 2, 8, 6), t, y)[0]
    assert larger.shape == (2, 2 + 12, 16)
    assert torch.equal(larger[:, :2], tokens[:, :2])


def test_the_condition_modulates_the_head():
    model = tiny(**LABELS).eval()
    x, t, y = inputs(model)
    assert not any("adaLN" in name for name in DiS(**TINY).state_dict())
    out = model(x, t, y)
    with torch.no_grad():
        for parameter in model.final_layer.adaLN_modulation.parameters():
            parameter.zero_()
    assert (model(x, t, y) - out).abs().max() > 1e-2


def test_positions_are_resampled_by_row_and_column():
    """A grid twice as high sees the columns of the built one, not its rows run together."""
    model = tiny(img_dim=8).eval()
    ramp = torch.linspace(-1, 1, 4).repeat(4, 1).reshape(16, 1)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 1:] = ramp
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
    tokens = model._tokens(torch.zeros(1, 2, 16, 8), torch.zeros(1), None)[0][:, 1:]
    grid = tokens.reshape(8, 4, 16)
    assert_close("rows", grid, ramp.reshape(4, 4, 1)[:1].expand(8, 4, 16), of_max=1e-5)


def test_drop_path_schedule():
    model = DiS(**{**TINY, "depth": 4}, drop_path_rate=0.3)
    assert model.drop_path_rates == pytest.approx((0, 0, 0.1, 0.2, 0.3, 0.3))
    odd = DiS(**{**TINY, "depth": 5}, drop_path_rate=0.4)
    assert odd.drop_path_rates == pytest.approx((0, 0, 0.1, 0.2, 0.3, 0.4))


def test_drop_path_follows_the_keys_not_the_batch_and_is_off_in_eval():
    model = tiny(drop_path_rate=0.5).train()
    x, t, _ = inputs(model, batch=8)
    ids = torch.arange(100, 108)
    with KeyedDraws(7, ids).active():
        whole = model(x, t)
    with KeyedDraws(7, ids[2:4]).active():
        part = model(x[2:4], t[2:4])
    assert_close("rows", part, whole[2:4], of_max=1e-5)
    assert (whole - model.eval()(x, t)).abs().max() > 1e-3
    assert torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("size", [(4, 6), (8, 4)])
@pytest.mark.parametrize("scan", ["zigzag", "hilbert", "spiral:2"])
def test_a_scan_visits_the_patches_and_leaves_the_extra_tokens_in_front(scan, size):
    """Blocks read plain sequences: a scanned model is the raster one whose mixers permute their patches."""
    model = tiny(**LABELS, scan=scan).eval()
    plain = tiny(**LABELS).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    given = inputs(model, size=size)
    name, _, count = scan.partition(":")
    height, width = size[0] // 2, size[1] // 2
    paths = get_scan(name)(height, width)[: int(count or 99)]
    for i, block in enumerate(plain.named_blocks().values()):
        order = torch.from_numpy(np.r_[0, 1, 2 + paths[i % len(paths)].order])
        back = order.argsort()
        block.mixer.register_forward_pre_hook(lambda module, args, order=order: (args[0][:, order],))
        block.mixer.register_forward_hook(lambda module, args, out, back=back: out[:, back])
    want = plain(*given)
    assert_close("scanned", model(*given), want, of_max=1e-5)
    assert_close("again, kept", model(*given), want, of_max=1e-5)
    assert (want - tiny(**LABELS).eval()(*given)).abs().max() > 1e-3


def test_a_raster_scan_costs_no_gather():
    assert list(tiny(scan="sweep1").orders.buffers()) == []
    assert list(tiny(scan="from_model").orders.buffers()) == []
    assert {tuple(b.shape) for b in tiny(scan="zigzag").orders.buffers()} == {(6 + 1,)}


def test_random_scans_are_stored():
    first, again, other = (tiny(scan="random:2", scan_seed=seed).scan_state() for seed in (5, 5, 6))
    assert list(first) == [f"blocks.{i}.order" for i in range(5)]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert tiny(scan="hilbert").scan_state() == tiny().scan_state() == {}


def test_a_mixer_of_ones_own():
    class Mean(torch.nn.Module):
        def __init__(self, dim, bias=True, device=None, dtype=None):
            super().__init__()
            self.linear = torch.nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

        def forward(self, x):
            return self.linear(x) + x.mean(1, keepdim=True)

    model = DiS(**TINY, mixer=Mean, ssm_cfg={"bias": False})
    assert model(*inputs(model)).shape == (2, 4, 4, 6)
    assert "mid_block.mixer.linear.bias" not in model.state_dict()


@pytest.mark.parametrize("channels, guided", [(None, 4), (3, 3)])
def test_the_published_guided_call(channels, guided):
    model = tiny(in_channels=4, guided_channels=channels, **LABELS).eval()
    x, t, y = inputs(model)
    cond, uncond = model(x, t, y), model(x, t, model.null_condition(y))
    doubled = (
        torch.cat([x, torch.full_like(x, 7.0)]),
        torch.cat([t, t]),
        torch.cat([y, model.null_condition(y)]),
    )
    out = model.forward_with_cfg(*doubled, 2.5)
    want = (uncond + 2.5 * (cond - uncond))[:, :guided]
    assert_close("first half", out[:2, :guided], want, of_max=1e-5)
    assert_close("second half", out[2:, :guided], want, of_max=1e-5)
    assert_close("rest", out[:, guided:], torch.cat([cond, uncond])[:, guided:], of_max=1e-5)


def test_unconditional_models_take_no_condition():
    model = tiny().eval()
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="class_dropout_prob"):
        model.null_condition(torch.tensor([0, 1]))


def test_it_trains_under_the_flow_process_without_variance():
    model = DiS(**TINY, learn_sigma=False)
    x, _, y = inputs(model)
    Flow().loss(model, x, torch.randn_like(x), torch.rand(2), y).mean().backward()
    assert model.mid_block.mixer.in_proj.weight.grad.abs().max() > 0
    overrides = ["model=dis_s_2", "run_dir=unused", "model.in_channels=1", "model.img_dim=8"]
    cfg = compose_config(overrides)
    with pytest.raises(SettingsError, match=r"model=dis_s_2 .*model\.learn_sigma=false"):
        check_training(plugins.checked(OmegaConf.to_container(cfg, resolve=True)))
    for more in (["model.learn_sigma=false"], ["process=gaussian"]):
        cfg = compose_config([*overrides, *more])
        check_training(plugins.checked(OmegaConf.to_container(cfg, resolve=True)))


@pytest.mark.parametrize(
    "changes", [LABELS, {"skip": False, "mlp_time_embed": False, "rms_norm": False}], ids=["dis", "plain"]
)
def test_bfloat16_stays_close(changes):
    torch.manual_seed(0)
    model = DiS(**{**TINY, "embed_dim": 32, "depth": 8}, **changes).eval()
    x, t, y = inputs(model, batch=4)
    want = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x, t, y)
    assert_relative_rms("autocast", got.float(), want, BF16_RELATIVE_RMS / 2)
    got = model.bfloat16()(x, t, y)
    assert got.dtype == torch.bfloat16
    assert_relative_rms("weights", got.float(), want, BF16_RELATIVE_RMS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_dim": 5}, "divisible"),
        ({"depth": -1}, "depth is at least 0"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
        ({"class_dropout_prob": 0.1}, "set num_classes"),
        ({"guided_channels": 99}, r"guided_channels is 1\.\.\d \(output channels\)"),
        ({"scan": "zigzg"}, "zigzag"),
        ({"ssm_cfg": {"d_stat": 4}}, "d_state"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate.*\[0, 1\)"),
        ({"embd_dim": 3}, "embd_dim"),
    ],
)
def test_wrong_construction_is_explained(changes, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        DiS(**{**TINY, **changes})


OFFICIAL = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "depth": 4, "channels": 4, "num_classes": 3}


def test_official_weights_load_with_official_keywords():
    source = tiny(in_channels=4, img_dim=4, num_classes=3, class_dropout_prob=0.1).eval()
    model = load_official("dis", OFFICIAL, source.state_dict())
    assert not model.training
    assert (model.guided_channels, model.class_dropout_prob) == (3, 0.1)
    given = inputs(model)
    assert torch.equal(model(*given), source(*given))
    same = {"fused_add_norm": False, "initializer_cfg": {}, "conv": False, "bimamba_type": "v2"}
    assert torch.equal(
        load_official("dis", {**OFFICIAL, **same}, source.state_dict())(*given), source(*given)
    )
    assert load_official("dis", OFFICIAL, source.state_dict(), guided_channels=4).guided_channels == 4
    for wrong, message in (
        ({"img_dim": 4}, "img_size and img_dim"),
        ({"num_classes": 4}, "do not fit"),
        ({"class_dropout_prob": 0.0}, "do not fit"),
        ({"bimamba_type": "v1"}, "'v2' alone"),
    ):
        with pytest.raises(ValueError, match=message):
            load_official("dis", {**OFFICIAL, **wrong}, source.state_dict())


@pytest.mark.parametrize("latent", [True, False])
def test_files_of_the_training_script_are_read_and_nothing_else(tmp_path, latent):
    """train.py stores model, EMA, optimizer and the parsed command line."""
    weights = {"pos_embed": torch.ones(1, 4, 16)}
    args = argparse.Namespace(
        model="DiS-M/4",
        image_size=64,
        num_classes=7 if latent else -1,
        latent_space=latent,
        data_path="imagenet",
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    content = {"model": {"pos_embed": torch.zeros(1, 4, 16)}, "ema": weights, "opt": optimizer, "args": args}
    torch.save(content, tmp_path / "0000010.pt")
    found = read_official(tmp_path / "0000010.pt", "dis")
    assert torch.equal(found.state_dict["pos_embed"], weights["pos_embed"])
    assert found.ctor_kwargs == {
        "img_size": 8 if latent else 64, "patch_size": 4, "embed_dim": 768, "depth": 48,
        "channels": 4 if latent else 3, "num_classes": 7 if latent else -1,
    }  # fmt: skip
    with torch.device("meta"):
        model = DiS(**official_arguments("dis", found.ctor_kwargs))
    assert model.class_dropout_prob == (0.1 if latent else 0)
    torch.save({**content, "args": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        read_official(tmp_path / "bad.pt", "dis")
