"""DiM: manifests, directions and skips, the padded layout, other grids, official weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.assertions import BF16_RELATIVE_RMS, assert_close, assert_relative_rms
from tests.models import test_transformers as common
from tests.models.transformers import filled, inputs, run
from zigflow.models import build_variant
from zigflow.models.dim import PUBLISHED, DiM
from zigflow.nn.flops import count_flops
from zigflow.official import family_of, load_official, official_arguments, read_official
from zigflow.plugins import compose_config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "dis_dim" / "manifests"
MANIFESTS = {
    "s": "cifar10_S_DiM",
    "l": "imagenet256_L_DiM",
    "h": "imagenet256_H_DiM",
    "h_512": "imagenet512_H_DiM_ft",
    "h_1024": "imagenet512_H_DiM_upsample_test",
    "h_1536": "imagenet512_H_DiM_upsample_3x_test",
}
TINY = {
    "in_channels": 2, "img_dim": (4, 6), "patch_size": 2, "embed_dim": 16, "depth": 5, "num_classes": 3,
    "class_dropout_prob": 0.3, "ssm_cfg": {"d_state": 4},
}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return filled(DiM(**{**TINY, **changes}))


def configured(name):
    node = dict(compose_config(["data=none", f"model={name}", "run_dir=unused"])["model"])
    assert node.pop("name") == name
    assert node.pop("_target_") == "zigflow.models.dim.DiM"
    return node


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_shapes_and_totals_equal_the_manifest(name):
    manifest = json.loads((FIXTURES / f"DiM_{MANIFESTS[name]}.json").read_text())
    config = json.loads((FIXTURES / f"DiM_{MANIFESTS[name]}_config.json").read_text())
    with torch.device("meta"):
        published = DiM(**official_arguments("dim", manifest["nnet"]))
        variant, own = build_variant(f"dim_{name}"), DiM(**configured(f"dim_{name}"))
    shapes = {k: list(p.shape) for k, p in published.state_dict().items()}
    assert list(shapes.items()) == list(manifest["shapes"].items())
    assert sum(p.numel() for p in published.parameters()) == manifest["total_params"]
    for model in (variant, own):
        assert {k: list(p.shape) for k, p in model.state_dict().items()} == shapes
        assert (model.img_dim, model.pad_layout, model.official_skip_tuning) == (
            published.img_dim, published.pad_layout, published.official_skip_tuning,
        )  # fmt: skip
        assert model.class_dropout_prob == config["dataset"].get("p_uncond", 0.0)
        assert (model.num_classes > 0) == (config["train"]["mode"] == "cond")


def test_every_published_variant_has_a_manifest():
    assert set(MANIFESTS) == set(PUBLISHED)


@pytest.mark.parametrize("case", ["dim", "dim-split"])
def test_compiled_equals_eager_with_at_most_three_graphs(case):
    common.test_compiled_equals_eager_with_at_most_three_graphs(case)


@pytest.mark.parametrize("depth, pairs", [(1, []), (2, []), (4, [(3, 1)]), (7, [(4, 3), (5, 2), (6, 1)])])
def test_skips_join_outputs_of_the_same_direction(depth, pairs):
    model = tiny(depth=depth).eval()
    seen = {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({i: (args, out)}))
    model(*inputs(model))
    schedule = model.walk(model.grid)[0]
    for joining, kept in pairs:
        assert torch.equal(seen[joining][0][4], seen[kept][1])
        # The stream reaches the block in the order of the block before.
        assert schedule[joining - 1].path == schedule[kept].path
    blocks = model.transformer_blocks
    assert [i for i, b in enumerate(blocks) if b.skip_linear is not None] == [joining for joining, _ in pairs]
    assert sum(args[4] is not None for args, _ in seen.values()) == len(pairs)


def test_each_block_mixes_the_tokens_in_its_own_order():
    """Gathers composed of two orders equal a gather and its inverse around each mixer."""
    model = tiny(depth=5).eval()
    given = inputs(model)
    seen = {}
    for i, block in enumerate(model.transformer_blocks):
        block.norm1["norm"].register_forward_hook(lambda module, args, out, i=i: seen.update({i: args[0]}))
    out, features = model(*given, return_features=tuple(f"transformer_blocks.{i}" for i in range(5)))
    schedule = model.walk(model.grid)[0]
    assert len({s.path for s in schedule}) == 3
    for i in (1, 2):
        before = features[f"transformer_blocks.{i - 1}"]
        assert torch.equal(seen[i], before[:, schedule[i].path.order.copy()])
    assert torch.equal(out, model(*given))


def test_the_sequence_is_time_class_split_tokens_and_the_padded_grid():
    model = tiny(pad_layout="rho_pad").eval()
    x, t, y = inputs(model)
    tokens, _, _, grid, plan = model._embed(x, t, y)
    pads = model.a4m_adapter.pad_token[0].T
    assert grid == (2, 3) and tokens.shape == (2, 5 + 5 * 6, 16)
    assert_close("class", tokens[:, 1], model.label_emb(y) + model.additional_embed[:, 1])
    assert torch.equal(tokens[0, 2:5], model.a4m_adapter.pad_token_dec_split[0])
    body = tokens[:, 5:].reshape(2, 5, 6, 16)
    assert torch.equal(body[1, 0, 3:], pads)
    assert torch.equal(body[1, 2:].reshape(18, 16), pads.repeat(6, 1))
    assert torch.equal(tokens[:, plan.leave].reshape(2, 2, 3, 16), body[:, :2, :3])
    lateral = tiny().eval()
    body = lateral._embed(x, t, y)[0][:, 5:].reshape(2, 5, 6, 16)
    assert torch.equal(body[1, 2:], lateral.a4m_adapter.pad_token[0].T[:, None].expand(3, 6, 16))


def test_positions_follow_the_image_and_not_the_token_number():
    """With the axes of kernels, table and head exchanged, and columns walked for rows, a model sees the exchanged
    image: its bottom pads are those of the row ends."""
    model, turned = (
        tiny(scan="sweep1", num_pads=1).eval(),
        tiny(scan="sweep4", num_pads=1, img_dim=(6, 4)).eval(),
    )
    state = model.state_dict()
    table = state["additional_embed"][:, 2:].reshape(2, 3, -1).transpose(0, 1).reshape(1, 6, -1)
    state["additional_embed"] = torch.cat([state["additional_embed"][:, :2], table], dim=1)
    for name in (
        "pos_embed.proj.weight",
        "a4m_adapter.first_smoother.weight",
        "a4m_adapter.last_smoother.weight",
    ):
        state[name] = state[name].mT
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        shape = state[name].shape
        state[name] = state[name].reshape(2, 2, 2, -1).transpose(0, 1).reshape(shape)
    turned.load_state_dict(state)
    columns = turned.walk((3, 2))[0]
    assert columns[2].path.name.startswith("sweep4[2]")

    def columns_only(grid):
        from scans import composed_walk, get_scan, mirrored_schedule
        from zigflow.models.dim import padded_layout

        layout = padded_layout(*grid, 1, "lateral", 3)
        schedule = mirrored_schedule(layout, get_scan("sweep4")(*layout.body_shape)[2:3], 5)
        return schedule, composed_walk(layout, schedule)

    turned.walk = columns_only
    x, t, y = inputs(model)
    turned.orders._fill(x.device)
    assert_close("turned", turned(x.mT, t, y).mT, model(x, t, y), of_max=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (2, 10), (8, 8)])
def test_any_grid_as_built_and_as_another(size):
    model, built = tiny(img_dim=size).eval(), tiny(img_dim=size).eval()
    x, t, y = inputs(model)
    want = model(x, t, y)
    # The same weights built for a square, with a table that is resampled to itself.
    other = tiny(img_dim=4).eval()
    state = {k: v for k, v in built.state_dict().items() if k != "additional_embed"}
    other.load_state_dict(state, strict=False)
    with torch.no_grad():
        other.additional_embed[:, 2:] = 0
        model.additional_embed[:, 2:] = 0
        other.additional_embed[:, :2] = model.additional_embed[:, :2]
    assert_close("other grid", other(x, t, y), model(x, t, y), of_max=1e-6)
    assert (want - model(x, t, y)).abs().max() > 0
    assert len(other.orders._others) == (size != (4, 4))


def test_plans_are_kept_for_a_few_grids_and_follow_the_model():
    model = tiny().eval()
    for side in range(2, 26, 2):
        x, t, y = inputs(model, size=(2, side))
        model(x, t, y)
    assert len(model.orders._others) == 8
    assert not any("move" in key or key in ("enter", "leave") for key in model.state_dict())
    assert {b.dtype for b in model.bfloat16().buffers()} == {torch.int64}


def test_unconditional_feeds_the_null_class():
    model = tiny(unconditional=True, class_dropout_prob=0.0).train()
    x, t, _ = inputs(model)
    assert (model.num_classes, len(model.label_emb.weight)) == (-1, 4)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([0, 1])))
    gradients = run(model)[1]
    assert gradients["label_emb.weight"][:3].abs().max() == 0 < gradients["label_emb.weight"][3].abs().max()
    labeled = tiny().eval()
    assert_close("null", labeled(x, t), labeled(x, t, torch.tensor([3, 3])))
    assert len(tiny(num_classes=-1, class_dropout_prob=0.0).label_emb.weight) == 1
    with pytest.raises(ValueError, match="class labels"):
        tiny(class_dropout_prob=0.0).eval()(x, t)


def test_skip_tuning_as_published_and_as_intended():
    model = tiny(depth=7).eval()
    x, t, y = inputs(model)
    t = torch.tensor([1000.0, 0.0])
    plain = model(x, t, y)
    model.official_skip_tuning = "as_published"
    published = model(x, t, y)
    assert 0 < (published - plain).abs().max() < 1e-3 * plain.abs().max()
    model.official_skip_tuning = "as_intended"
    intended = model(x, t, y)
    assert_close("no noise", intended[1], plain[1], of_max=1e-6)
    assert (intended[0] - plain[0]).abs().max() > 1e-2 * plain.abs().max()
    weights = torch.stack(model.skip_weights(t, model.joining))
    assert_close("weights", weights, torch.tensor([[1, 1], [0.91, 1], [0.82, 1]]), of_max=1e-6)


@pytest.mark.parametrize("case", ["dim", "dim-split"])
def test_bfloat16_weights_and_autocast_stay_close(case):
    """With the weights that training starts from; no layer of them is zero."""
    torch.manual_seed(0)
    family, options = common.CASES[case]
    model = family(**{**common.SIZE, **options}).eval()
    x, t, y = inputs(model, batch=4)
    want = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x, t, y)
    assert_relative_rms("autocast", got.float(), want, BF16_RELATIVE_RMS)
    got = model.bfloat16()(x, t, y)
    assert got.dtype == torch.bfloat16
    assert_relative_rms("weights", got.float(), want, 2 * BF16_RELATIVE_RMS)


def test_the_residual_stream_stays_float32_where_blocks_compute_in_bfloat16():
    seen = set()
    for options, wanted in (({}, torch.float32), ({"residual_in_fp32": False}, torch.bfloat16)):
        model = tiny(**options).bfloat16().eval()
        seen.clear()
        for block in model.transformer_blocks:
            block.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
        assert model(*inputs(model)).dtype == torch.bfloat16
        assert seen == {wanted}


def test_operations_are_counted_over_the_padded_tokens():
    model = tiny()
    count = count_flops(model)
    tokens, width, inner = 5 + 5 * 6, 16, 32
    mixer = "transformer_blocks.1.attn1"
    # A multiply-add is two; one step rank and two times four states come out of x_proj.
    assert count.modules[f"{mixer}.in_proj"] == 2 * tokens * width * 2 * inner
    assert count.modules[f"{mixer}.x_proj"] == 2 * tokens * inner * (1 + 2 * 4)
    assert count.modules["transformer_blocks.4.skip_linear"] == 2 * tokens * 2 * width * width
    assert count.modules["a4m_adapter.first_smoother"] == 2 * 6 * 9 * width


def test_random_scans_are_stored():
    model = tiny(scan="random", scan_seed=5)
    state = model.scan_state()
    order = state["layers.1.order"]
    assert order[:5].tolist() == [0, 1, 2, 3, 4] and sorted(order.tolist()) == list(range(35))
    assert not torch.equal(order, tiny(scan="random", scan_seed=6).scan_state()["layers.1.order"])
    assert tiny().scan_state() == {}


OFFICIAL = {
    "attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 5, "in_channels": 2, "out_channels": 2,
    "num_embeds_ada_norm": 3, "sample_size": 4, "patch_size": 2, "mamba_d_state": 4, "mamba_d_conv": 3,
    "mamba_expand": 2, "pad_token_schedules": ["dec_split", "lateral"], "scan_pattern_len": 3,
}  # fmt: skip


def test_official_files_and_keywords():
    source = tiny(img_dim=4, split_skip=True).eval()
    x, t, y = inputs(source)
    loaded = load_official("dim", OFFICIAL, source.state_dict())
    assert torch.equal(loaded(x, t, y), source(x, t, y))
    # As our keywords: the weights tell how skips are joined.
    own = load_official("dim", {**TINY, "img_dim": 4}, source.state_dict())
    assert torch.equal(own(x, t, y), source(x, t, y))
    assert family_of({"_target_": "zigflow.models.dim.DiM"}) == "dim"
    tuned = {**OFFICIAL, "is_skip_tune": True, "skip_tune_param": [0.82, 1.0]}
    assert load_official("dim", tuned, source.state_dict()).official_skip_tuning == "as_published"
    intended = load_official("dim", tuned, source.state_dict(), official_skip_tuning="as_intended")
    assert intended.official_skip_tuning == "as_intended"
    assert load_official("dim", OFFICIAL, source.state_dict()).official_skip_tuning is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_freeu": True}, "is_freeu=True.*False"),
        ({"pos_encoding_type": "fourier"}, "pos_encoding_type.*learnable"),
        ({"pad_token_schedules": ["dec_split"]}, "lateral and rho_pad"),
        ({"scan_pattern_len": "3"}, "scan_pattern_len='3'"),
        ({"out_channels": 3}, "out_channels=3.*2 or 4"),
        ({"out_channels": 4}, "do not fit dim"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None"),
        ({"num_patches": [8]}, "num_patches"),
        ({"img_dim": 4}, "sample_size and img_dim are one keyword"),
        ({"num_layer": 4}, "num_layer"),
        ({"num_layers": 7}, "do not fit dim"),
    ],
)
def test_official_keywords_that_no_published_model_has(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_official("dim", {**OFFICIAL, **changes}, tiny(img_dim=4).state_dict())


def test_a_folder_of_the_training_script_gives_its_average(tmp_path):
    folder = tmp_path / "425000.ckpt"
    folder.mkdir()
    torch.save({"label_emb.weight": torch.ones(4, 16)}, folder / "nnet_ema.pth")
    assert read_official(folder, "dim").state_dict["label_emb.weight"].min() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "depth is at least 1"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
        ({"unconditional": True}, "class_dropout_prob=0.3"),
        ({"pad_layout": "latera"}, "lateral"),
        ({"num_pads": 0}, "num_pads"),
        ({"num_paths": 0}, "num_paths"),
        ({"plain_blocks": 6}, "plain_blocks"),
        ({"smoother_dilation": 0}, "smoother_dilation"),
        ({"official_skip_tuning": "published"}, "as_published"),
        ({"scan": "sweep5"}, "sweep4"),
        ({"img_dim": 5}, "divisible"),
        ({"ssm_cfg": {"d_cnv": 3}}, "d_conv"),
    ],
)
def test_wrong_construction_is_explained(changes, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        DiM(**{**TINY, **changes})


@pytest.mark.parametrize(
    "official, ours",
    [
        ({"out_channels": 4}, {"learn_sigma": True}),
        ({"mlp_time_embed": True}, {"mlp_time_embed": True}),
        ({"is_uconnect": False}, {"skip": False}),
        ({"use_final_conv": True, "out_channels": 4}, {"conv": True, "learn_sigma": True}),
        ({"tkn_conv_dilated_rate": 2}, {"smoother_dilation": 2}),
        ({"encoder_start_blk_id": 3}, {"plain_blocks": 3}),
        ({"pad_token_len": 2}, {"num_pads": 2, "num_split": 2}),
        ({"scan_pattern_len": 0}, {"num_paths": 1}),
        ({"scan_pattern_len": 2}, {"num_paths": 3}),
        ({"scan_pattern_len": 7}, {}),
        ({"num_patches": [16, 4], "sample_size": 4}, {"img_dim": 8}),
    ],
)
def test_published_switches_build_the_model_that_ours_name(official, ours):
    source = tiny(**{"img_dim": 4, "split_skip": False, **ours}).eval()
    loaded = load_official("dim", {**OFFICIAL, **official}, source.state_dict())
    x, t, y = inputs(source)
    out = loaded(x, t, y)
    assert out.shape == (len(x), 4 if "learn_sigma" in ours else 2, *x.shape[2:])
    assert torch.equal(out, source(x, t, y))
    if "smoother_dilation" in ours:
        loaded.a4m_adapter.first_smoother.dilation = (1, 1)
        loaded.a4m_adapter.first_smoother.padding = (1, 1)
        assert not torch.equal(loaded(x, t, y), out)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_cycle_is_the_first_paths_of_the_scan(count):
    model = tiny(num_paths=count, depth=11)
    names = [step.path.name.partition(" ")[0] for step in model.walk(model.grid)[0]]
    up = [i % count for i in range(6)]
    assert [name[name.index("[") + 1] for name in names] == [str(i) for i in (*up, *up[-2::-1])]


def test_plain_blocks_keep_the_first_path_and_skips_their_directions():
    model = tiny(depth=9, plain_blocks=3).eval()
    schedule = model.walk(model.grid)[0]
    assert len({step.path for step in schedule[:3]}) == 1 and schedule[8].path == schedule[0].path
    blocks = model.transformer_blocks
    assert [i for i, b in enumerate(blocks) if b.skip_linear is not None] == [6, 7, 8]
    seen = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({i: (args, out)}))
    model(*inputs(model))
    for joining, kept in ((6, 5), (7, 4), (8, 3)):
        assert torch.equal(seen[joining][0][4], seen[kept][1])
        assert schedule[joining - 1].path == schedule[kept].path


def test_without_skips_any_depth():
    model = tiny(depth=4, skip=False).eval()
    out, features = model(*inputs(model), return_features=("transformer_blocks.3",))
    assert np.isfinite(out.detach().numpy()).all() and list(features) == ["transformer_blocks.3"]
    assert not any("skip_linear" in name for name in model.state_dict())
