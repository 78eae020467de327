"""DiT and SiT: manifests, variants, the counts of the paper, guidance, official files."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.assertions import assert_close
from tests.models.transformers import filled, inputs
from zigflow import plugins
from zigflow.models import build_variant
from zigflow.models.dit import SIZES, DiT
from zigflow.nn.flops import count_flops
from zigflow.official import load_official, read_official
from zigflow.plugins import compose_config
from zigflow.preflight import check_training
from zigflow.processes.flow import Flow
from zigflow.settings import SettingsError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "dit_uvit" / "manifests"
MANIFESTS = sorted(FIXTURES.glob("DiT-*.json"))
TINY = {"in_channels": 4, "img_dim": 4, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def variant_of(manifest):
    return "dit_" + manifest["model"].removeprefix("DiT-").replace("/", "_").lower()


def build(manifest, name):
    with torch.device("meta"):
        return build_variant(name, img_dim=manifest["latent"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_names_shapes_and_totals_equal_the_manifest(path):
    manifest = json.loads(path.read_text())
    model = build(manifest, variant_of(manifest))
    own = {k: list(p.shape) for k, p in model.state_dict().items()}
    assert list(own.items()) == list(manifest["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == manifest["params_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["params_trainable"]
    sit = build(manifest, variant_of(manifest).replace("dit", "sit"))
    assert {k: list(p.shape) for k, p in sit.state_dict().items()} == own


def test_every_size_is_published():
    known = {variant_of(json.loads(path.read_text())) for path in MANIFESTS}
    assert known == {f"dit_{size}_{patch}" for size in SIZES for patch in (2, 4, 8)}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_the_gflops_of_the_paper(path):
    manifest = json.loads(path.read_text())
    count = count_flops(build(manifest, variant_of(manifest)))
    assert count.macs == round(manifest["gmacs"] * 1e9)
    assert count.published == round(manifest["gmacs_plus_layernorm"] * 1e9)
    printed = manifest["published_gflops"]
    digits = 1 if printed > 500 else 2
    # The paper's B/4 says 5.56, by its own convention it is 5.566.
    slack = 0.01 if path.stem == "DiT-B-4_256" else 0.0
    assert abs(round(count.published / 1e9, digits) - printed) <= slack + 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_configurations_are_the_variants(family, size):
    for patch in (2, 4, 8):
        name = f"{family}_{size}_{patch}"
        node = dict(compose_config(["data=none", f"model={name}", "run_dir=unused"])["model"])
        assert node.pop("name") == name
        assert node.pop("_target_") == "zigflow.models.dit.DiT"
        with torch.device("meta"):
            own, variant = DiT(**{**node, "depth": 1}), build_variant(name, depth=1)
        assert node["depth"] == SIZES[size][1]
        assert str(own) == str(variant)
        assert own.out_channels == variant.out_channels == (8 if family == "dit" else 4)


def test_a_fresh_model_predicts_zero():
    model = DiT(**TINY)
    assert not model(*inputs(model)).any()


def test_sit_and_dit_train_under_the_flow_process():
    model = DiT(**TINY, drop_sigma=True)
    x, _, y = inputs(model)
    Flow().loss(model, x, torch.randn_like(x), torch.rand(2), y).mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0
    # The flow has no use for a learned variance: its channels are left out.
    Flow().loss(DiT(**TINY), x, torch.randn_like(x), torch.rand(2), y).mean().backward()


def test_variance_under_the_flow_process_is_refused_before_training():
    def check(*overrides):
        cfg = compose_config(["run_dir=unused", "model.in_channels=1", "model.img_dim=8", *overrides])
        check_training(plugins.checked(OmegaConf.to_container(cfg, resolve=True)))

    with pytest.raises(SettingsError, match=r"model=dit_s_2 .*model\.learn_sigma=false"):
        check("model=dit_s_2")
    check("model=dit_s_2", "model.learn_sigma=false")
    check("model=sit_s_2")


@pytest.mark.parametrize("channels, guided", [(None, 4), (3, 3)])
def test_the_published_guided_call(channels, guided):
    model = filled(DiT(**TINY, num_classes=3, guided_channels=channels)).eval()
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
    model = filled(DiT(**TINY, num_classes=-1, class_dropout_prob=0.0)).eval()
    x, t, _ = inputs(model)
    assert "y_embedder.embedding_table.weight" not in model.state_dict()
    assert torch.equal(model(x, t), model(x, t, torch.tensor([0, 1])))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"drop_sigma": True, "learn_sigma": False}, "learn_sigma"),
        ({"guided_channels": 9}, r"1\.\.8"),
        ({"depth": 0}, "depth is at least 1"),
    ],
)
def test_wrong_construction_is_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**TINY, **kwargs})


OFFICIAL = {"input_size": 4, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize("family, channels", [("dit", 8), ("sit", 4)])
def test_official_weights_load_with_official_keywords(family, channels):
    source = filled(DiT(**TINY, num_classes=3)).eval()
    model = load_official(family, OFFICIAL, source.state_dict())
    assert not model.training
    assert model.guided_channels == 3
    x, t, y = inputs(model)
    assert torch.equal(model(x, t, y), source(x, t, y)[:, :channels])
    ours = load_official(family, OFFICIAL, source.state_dict(), guided_channels=4)
    assert ours.guided_channels == 4
    with pytest.raises(ValueError, match="input_size and img_dim"):
        load_official(family, {**OFFICIAL, "img_dim": 4}, source.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        load_official(family, {**OFFICIAL, "num_classes": 4}, source.state_dict())


def test_sit_without_variance_channels():
    source = filled(DiT(**TINY, num_classes=3, learn_sigma=False)).eval()
    model = load_official("sit", {**OFFICIAL, "learn_sigma": False}, source.state_dict())
    assert torch.equal(model(*inputs(model)), source(*inputs(model)))


def test_files_of_the_training_script_are_read_and_nothing_else(tmp_path):
    """train.py stores model, EMA, optimizer and the parsed command line; released files are plain."""
    weights = {"pos_embed": torch.ones(1, 4, 16)}
    args = argparse.Namespace(model="DiT-B/4", image_size=256, num_classes=7, data_path="imagenet")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    content = {"model": {"pos_embed": torch.zeros(1, 4, 16)}, "ema": weights, "opt": optimizer, "args": args}
    torch.save(content, tmp_path / "0000010.pt")
    found = read_official(tmp_path / "0000010.pt", "dit")
    assert torch.equal(found.state_dict["pos_embed"], weights["pos_embed"])
    assert found.ctor_kwargs == {
        "input_size": 32, "patch_size": 4, "hidden_size": 768, "depth": 12, "num_heads": 12, "num_classes": 7,
    }  # fmt: skip
    torch.save(weights, tmp_path / "plain.pt")
    plain = read_official(tmp_path / "plain.pt", "dit")
    assert plain.ctor_kwargs is None
    assert list(plain.state_dict) == ["pos_embed"]
    with pytest.raises(ValueError, match=r"argparse\.Namespace, which uvit files do not need"):
        read_official(tmp_path / "0000010.pt", "uvit")
    torch.save({**content, "args": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        read_official(tmp_path / "bad.pt", "dit")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match="it is empty or cut"):
        read_official(tmp_path / "empty.pt", "dit")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="no file of torch") as refused:
        read_official(tmp_path / "bare.pt", "dit")
    assert "weights_only" not in str(refused.value)


def test_lightning_checkpoints_are_refused_with_what_they_are(tmp_path, capsys):
    """DiT-clipped's hold its network, CLIP and the autoencoder under ``state_dict``."""
    from zigflow import plugins
    from zigflow.sample_job import sample_from_config
    from zigflow.settings import SettingsError
    from zigflow.tools import __main__ as tools

    weights = {
        name: torch.zeros(1)
        for name in ("pos_embed", "x_embedder.proj.weight", "blocks.0.a", "blocks.1.a", "encoder.b", "vae.c")
    }
    path = tmp_path / "last.ckpt"
    content = {"state_dict": weights, "pytorch-lightning_version": "2.1.0", "epoch": 3, "callbacks": {}}
    torch.save(content, path)
    for family in ("dit", "uvit_t2i", "zigma"):
        with pytest.raises(ValueError, match=r"DiT-clipped .*\(2 weights of blocks.*model=dit_clipped"):
            read_official(path, family)
    command = ["convert-checkpoint", str(path), "model=dit_clipped", "--output", str(tmp_path / "out")]
    assert tools.main(command) == 1
    assert "another network than model=dit_clipped" in capsys.readouterr().err
    given = [f"ckpt={path}", "model=dit_clipped", "data=none", f"run_dir={tmp_path}/log"]
    with pytest.raises(SettingsError, match=r"last\.ckpt is a DiT-clipped checkpoint"):
        sample_from_config(plugins.compose_config(given, "sample"))
    torch.save({**content, "state_dict": {"layer.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="save its weights as a plain dict"):
        read_official(path, "dit")
    torch.save({**content, "hyper_parameters": argparse.Namespace()}, path)
    with pytest.raises(ValueError, match=r"argparse\.Namespace, which uvit files do not need"):
        read_official(path, "uvit")
