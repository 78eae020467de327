"""ZigMa: names and sizes against the manifests, its options, grids, compilation, checkpointing, guidance."""

import json
from pathlib import Path

import pytest
import torch

from model_zigma import ZigMa
from scans import list_scans
from tests.assertions import assert_close
from zigflow.keyed import KeyedDraws
from zigflow.nn import Condition
from zigflow.official import load_official

MANIFESTS = sorted((Path(__file__).parents[1] / "parity" / "fixtures" / "zigma" / "manifests").glob("*.json"))
TINY = {"in_channels": 2, "embed_dim": 16, "depth": 3, "img_dim": 4, "patch_size": 1}


def tiny(**kwargs):
    """A small model whose zero-initialized layers are filled, so that nothing hides behind them."""
    model = ZigMa(**{**TINY, **kwargs})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() == 0:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def inputs(batch=2, size=(4, 4), channels=2, frames=0):
    shape = (batch, frames, channels, *size) if frames else (batch, channels, *size)
    return torch.randn(shape), torch.rand(batch)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_names_shapes_and_totals_equal_the_manifest(path):
    manifest = json.loads(path.read_text())
    model = ZigMa(**manifest["ctor_kwargs"], device="meta")
    own = {k: list(p.shape) for k, p in model.named_parameters()}
    assert own == {k: v["shape"] for k, v in manifest["params"].items()}
    assert sum(p.numel() for p in model.parameters()) == manifest["total_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["trainable_params"]
    assert set(model.state_dict()) == set(own) | set(manifest["state_dict_keys_not_parameters"])
    if manifest["state_dict_order_equals_param_order"]:
        assert list(own) == list(manifest["params"])
    assert_close(
        "rates", torch.tensor(model.drop_path_rates[:-1]), torch.tensor(manifest["drop_path_per_block"])
    )
    assert model.drop_path_rates[-1] == manifest["drop_path_final"]


def test_quick_demo_of_the_readme_has_the_published_size():
    """Its shapes; ``tests/docs`` runs the very lines."""
    with torch.device("meta"):
        model = ZigMa(
            in_channels=3, embed_dim=640, depth=18, img_dim=32, patch_size=1, has_text=True, d_context=768,
            n_context_token=77, scan_type="zigzagN8", use_pe=2,
        )  # fmt: skip
        assert model(torch.rand(10, 3, 32, 32), torch.rand(10), y=torch.rand(10, 77, 768)).shape == (
            10,
            3,
            32,
            32,
        )
    assert sum(p.numel() for p in model.parameters()) == 116_996_483


@pytest.mark.parametrize("scan_type", ["v1", "v2", "zigzagN8", "hilbertN2", "randomN3", "parallelN4"])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 7)])
def test_any_grid_and_other_sizes_than_built_for(scan_type, size):
    model = tiny(scan_type=scan_type, img_dim=size, use_pe=2).eval()
    for given in (size, (size[0] + 2, size[1] + 1)):
        x, t = inputs(size=given)
        out = model(x, t)
        assert out.shape == x.shape
        assert torch.isfinite(out).all()


def test_a_size_first_seen_in_inference_mode_can_be_trained_on():
    model = tiny(scan_type="zigzagN8", img_dim=4)
    x, t = torch.randn(2, 2, 3, 5), torch.rand(2)
    with torch.inference_mode():
        model.eval()(x, t)
    model.train()(x, t).sum().backward()


@pytest.mark.parametrize("name", list_scans())
def test_every_registered_scan_drives_the_model(name):
    model = tiny(scan_type="v1", scan=name).eval()
    x, t = inputs()
    out = model(x, t)
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_relabeling_tokens_and_orders_together_changes_nothing():
    """With one walk per layer, a model without positions sees only the order in which tokens come."""
    model = tiny(scan_type="zigzagN1").eval()
    x, t = inputs()
    want = model(x, t)
    walk = model.orders.at(model.token_grid, x.device)[0]
    shuffle = torch.randperm(16)
    inverse = torch.argsort(shuffle)
    # Token i of the shuffled image is token shuffle[i] of the original.
    order = inverse[walk.order]
    back = torch.argsort(order)
    shuffled = walk._replace(order=order, inverse=back, undo=back, undo_inverse=order)
    model.orders.at = lambda *a: (shuffled,) * 3
    got = model(x.flatten(2)[:, :, shuffle].view_as(x), t)
    assert_close("relabeled", got.flatten(2)[:, :, inverse], want.flatten(2), of_max=1e-5)


@pytest.mark.parametrize("word", ["sst", "st", "tts", "s", "t"])
@pytest.mark.parametrize("use_pe", [0, 1, 2, 3])
def test_video_with_factorized_schedules(word, use_pe):
    model = tiny(scan_type=f"zzvideo_{word}", video_frames=3, use_pe=use_pe, tpe=use_pe == 2, depth=4).eval()
    x, t = inputs(frames=3)
    assert model(x, t).shape == x.shape
    longer, t = inputs(frames=5, size=(6, 4))
    assert model(longer, t).shape == longer.shape


@pytest.mark.parametrize("scan", list_scans(dims=3))
def test_every_joint_scan_takes_videos(scan):
    """All frames in one walk: a token sees the frames before it, and other frame counts and sizes are taken."""
    model = tiny(scan_type=scan, video_frames=3).eval()
    replaced = tiny(scan_type="zigzagN8", scan=scan, video_frames=3).eval()
    replaced.load_state_dict(model.state_dict())
    x, t = inputs(frames=3)
    assert model(x, t).shape == x.shape
    assert torch.equal(model(x, t), replaced(x, t)), "scan= and scan_type= name the same walk"
    changed = x.clone()
    changed[:, 0] += 1
    assert ((model(changed, t) - model(x, t))[:, 1:].abs() > 1e-6).any(), "frames are mixed"
    longer, t = inputs(frames=5, size=(6, 4))
    assert model(longer, t).shape == longer.shape


def test_temporal_layers_keep_frames_in_place_unless_asked_for_the_published_reversal():
    """A temporal layer with a mixer that does nothing must leave frames where they are."""
    right = tiny(scan_type="zzvideo_t", video_frames=3, depth=2).eval()
    published = tiny(scan_type="zzvideo_t", video_frames=3, depth=2, official_temporal_reversal=True).eval()
    published.load_state_dict(right.state_dict())
    for model in (right, published):
        for block in model.blocks:
            block.mixer = torch.nn.Identity()
    x, t = inputs(frames=3)
    plain = tiny(scan_type="v1", video_frames=3, depth=2).eval()
    plain.load_state_dict(right.state_dict(), strict=False)
    for block in plain.blocks:
        block.mixer = torch.nn.Identity()
    assert_close("identity", right(x, t), plain(x, t), of_max=1e-5)
    assert (published(x, t) - plain(x, t)).abs().max() > 1e-2


def test_positions_per_block_are_registered_trained_and_used():
    model = tiny(use_pe=3).eval()
    names = [n for n, _ in model.named_parameters() if n.endswith(".pos_embed")]
    assert names == [f"blocks.{i}.pos_embed" for i in range(3)]
    x, t = inputs()
    before = model(x, t)
    before.sum().backward()
    assert all(model.get_parameter(n).grad.abs().max() > 0 for n in names)
    with torch.no_grad():
        model.get_parameter(names[1]).add_(1.0 * torch.randn(1, 16, 16))
    assert (model(x, t) - before).abs().max() > 1e-4


def test_official_weights_load_into_a_model_with_positions_per_block():
    source = tiny(use_pe=0)
    loaded = load_official("zigma", {**TINY, "use_pe": 3}, source.state_dict())
    assert not loaded.training
    x, t = inputs()
    assert_close("zero tables", loaded(x, t), source.eval()(x, t), of_max=1e-6)


def test_unfitting_weights_name_the_keys():
    with pytest.raises(ValueError, match=r"left over.*shape.*x_embedder"):
        load_official("zigma", {**TINY, "in_channels": 3, "use_pe": 0}, tiny(use_pe=2).state_dict())
    with pytest.raises(KeyError, match="zigma"):
        load_official("zigmo", TINY, {})


CASES = {
    "zigzag": {"scan_type": "zigzagN2"},
    "bidirectional": {"scan_type": "v2", "num_classes": 3, "class_dropout_prob": 0.3},
    "text": {"scan_type": "zigzagN2", "has_text": True, "d_context": 6},
    "video": {"scan_type": "zzvideo_st", "video_frames": 2},
}


def _run(model, seed=0):
    torch.manual_seed(seed)
    x, t = inputs(batch=3, frames=model.video_frames)
    y = torch.randn(3, 4, 6) if model.has_text else None
    y = torch.tensor([0, 1, 2]) if model.num_classes > 0 else y
    x.requires_grad_()
    with KeyedDraws(0, torch.arange(3)).active():
        out = model(x, t, y)
    out.square().sum().backward()
    gradients = {"x": x.grad.clone()} | {
        k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize("policy", ["block", "selective"])
@pytest.mark.parametrize("case", CASES)
def test_checkpointed_equals_plain(case, policy):
    model = tiny(**CASES[case], drop_path_rate=0.4).train()
    want, want_gradients = _run(model)
    model.set_checkpoint_policy(policy)
    got, gradients = _run(model)
    assert torch.equal(got, want)
    assert gradients.keys() == want_gradients.keys()
    for name in gradients:
        assert torch.equal(gradients[name], want_gradients[name]), name


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager_with_at_most_three_graphs(case):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny(**CASES[case], depth=6, drop_path_rate=0.4).train()
    keys = list(model.state_dict())
    want, want_gradients = _run(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter)
    got, gradients = _run(model)
    assert 1 <= counter.frame_count <= 3
    assert list(model.state_dict()) == keys
    assert_close("out", got, want)
    for name in want_gradients:
        assert_close(name, gradients[name], want_gradients[name], of_max=1e-3)


@pytest.mark.parametrize("use_pe", [0, 2, 3])
def test_gradients_of_torch_func_equal_those_of_autograd(use_pe):
    model = tiny(use_pe=use_pe).eval()
    x, t = inputs()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, t)).square().sum()

    got = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        assert_close(name, got[name], parameter.grad, of_max=1e-4)


def test_drop_path_and_label_dropout_follow_the_keys_not_the_batch():
    model = tiny(num_classes=3, class_dropout_prob=0.5, drop_path_rate=0.5, depth=4).train()
    x, t = inputs(batch=6)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    ids = torch.arange(100, 106)
    with KeyedDraws(7, ids).active():
        whole = model(x, t, y)
    with KeyedDraws(7, ids[2:4]).active():
        part = model(x[2:4], t[2:4], y[2:4])
    assert_close("rows", part, whole[2:4], of_max=1e-5)
    with KeyedDraws(8, ids).active():
        other = model(x, t, y)
    assert (other - whole).abs().max() > 1e-3


def test_null_condition_and_the_row_it_needs():
    plain = tiny(num_classes=3)
    assert plain.y_embedder.embedding_table.weight.shape == (3, 16)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        plain.null_condition(torch.tensor([0]))
    dropping = tiny(num_classes=3, class_dropout_prob=0.1).eval()
    assert dropping.y_embedder.embedding_table.weight.shape == (4, 16)
    null = dropping.null_condition(torch.tensor([0, 2]))
    assert null.tolist() == [3, 3]
    x, t = inputs()
    assert torch.equal(dropping(x, t), dropping(x, t, null))


def test_null_condition_of_a_condition_keeps_the_rest():
    labels, tokens = torch.tensor([0, 2]), torch.randn(2, 5, 6)
    mask, pooled = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool), torch.randn(2, 4)
    given = Condition(labels=labels, tokens=tokens, mask=mask, pooled=pooled)
    null = tiny(num_classes=3, class_dropout_prob=0.1).null_condition(given)
    assert null.labels.tolist() == [3, 3]
    assert null.tokens is tokens
    assert null.mask is mask
    text = tiny(has_text=True, d_context=6, class_dropout_prob=0.1)
    null = text.null_condition(given)
    assert null.tokens.shape == tokens.shape
    assert not null.tokens.any()
    assert null.mask is mask
    assert null.pooled is pooled
    assert null.labels is labels
    with pytest.raises(ValueError, match=r"Condition\(tokens=\.\.\.\)"):
        text.null_condition(Condition(labels=labels))


def test_condition_objects_masks_and_features():
    model = tiny(has_text=True, d_context=6).eval()
    x, t = inputs()
    tokens = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    out, features = model(x, t, Condition(tokens=tokens, mask=mask), return_features=("blocks.1",))
    assert features["blocks.1"].shape == (2, 16, 16)
    short = model(x[:1], t[:1], tokens[:1, :3])
    assert_close("masked tokens are not read", out[:1], short, of_max=1e-5)
    assert_close("plain tokens", model(x, t, tokens), model(x, t, Condition(tokens=tokens)), of_max=1e-6)
    with pytest.raises(KeyError, match=r"blocks\.1"):
        model(x, t, tokens, return_features=("block.1",))
    with pytest.raises(ValueError, match=r"bool \(2, 5\).*torch.float32"):
        model(x, t, Condition(tokens=tokens, mask=mask.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_of_the_constructor(dtype):
    model = ZigMa(**TINY, dtype=dtype, device="cpu").eval()
    x, t = inputs()
    assert model(x.to(dtype), t).dtype == dtype


def test_bf16_autocast_stays_close():
    model = tiny(scan_type="zigzagN2", num_classes=3).eval()
    x, t = inputs()
    y = torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x, t, y)
    want = model(x, t, y)
    assert ((got.float() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()) < 2e-2


def test_random_scans_are_reproducible_and_stored():
    a, b = tiny(scan_type="randomN3", scan_seed=5), tiny(scan_type="randomN3", scan_seed=5)
    other = tiny(scan_type="randomN3", scan_seed=6)
    state = a.scan_state()
    assert state
    assert not any(k in a.state_dict() for k in state)
    assert all(torch.equal(order, b.scan_state()[name]) for name, order in state.items())
    assert any(not torch.equal(order, other.scan_state()[name]) for name, order in state.items())
    assert tiny(scan_type="zigzagN8").scan_state() == {}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"use_pe": 4}, "use_pe"),
        ({"has_text": True}, "d_context"),
        ({"tpe": True}, "video_frames"),
        ({"class_dropout_prob": 0.1}, "num_classes"),
        ({"class_dropout_prob": 1.0, "num_classes": 2}, "class_dropout_prob"),
        ({"img_dim": 5, "patch_size": 2}, "divisible"),
        ({"scan_type": "zigzagN9"}, "9"),
        ({"scan_type": "zigzg"}, "zigzag"),
        ({"ssm_cfg": {"d_stat": 4}}, "d_stat"),
        ({"use_pe": 1, "embed_dim": 18}, "divisible by 4"),
    ],
)
def test_wrong_construction_is_explained(kwargs, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        ZigMa(**{**TINY, **kwargs})


def test_wrong_input_is_explained():
    model = tiny(num_classes=3)
    x, t = inputs()
    for bad, message in (
        ((x[:, :1], t, torch.tensor([0, 1])), "C=2"),
        ((x, t[:1], torch.tensor([0, 1])), "one time per sample"),
        ((x, t, None), "class labels"),
        ((x, t, torch.rand(2)), "class labels"),
        ((x.unsqueeze(1), t, torch.tensor([0, 1])), "video_frames=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*bad)


@pytest.mark.parametrize("dropping", [False, True])
def test_labels_without_a_row_are_named(dropping):
    model = tiny(num_classes=3, class_dropout_prob=0.1 if dropping else 0.0).eval()
    x, t = inputs()
    last = 3 if dropping else 2
    assert torch.isfinite(model(x, t, torch.tensor([0, last]))).all()
    for bad in ([0, last + 5], [-1, 0]):
        with pytest.raises(ValueError, match=rf"{min(bad)} to {max(bad)}.*num_classes=3.*labels 0\.\.2"):
            model(x, t, torch.tensor(bad))
    y = torch.tensor([0, 2])
    want = model(x, t, y)
    assert_close("jvp", torch.func.jvp(lambda v: model(v, t, y), (x,), (x,))[0], want)
    one = torch.func.vmap(lambda v, s, k: model(v[None], s[None], k[None])[0])
    assert_close("vmap", one(x, t, y), want)


def test_a_batch_of_no_samples_is_explained():
    for frames in (0, 3):
        model = tiny(scan_type="v1", video_frames=frames)
        x, t = inputs(batch=0, frames=frames)
        with pytest.raises(ValueError, match="a batch of 0 samples"):
            model(x, t)


def test_official_weights_of_random_scans_need_a_seed_of_ours():
    source = tiny(scan_type="randomN3", scan_seed=5)
    arguments = {**TINY, "scan_type": "randomN3"}
    for given in (arguments, {**arguments, "scan_seed": 5}):
        with pytest.raises(ValueError, match=r"randomN3 do not hold their permutations.*scan_seed="):
            load_official("zigma", given, source.state_dict())
    loaded = load_official("zigma", arguments, source.state_dict(), scan_seed=5)
    x, t = inputs()
    assert torch.equal(loaded(x, t), source.eval()(x, t))


def test_gradients_reach_every_parameter():
    for case in CASES.values():
        model = tiny(**case).train()
        _, gradients = _run(model)
        assert set(gradients) == {"x"} | {k for k, p in model.named_parameters() if p.requires_grad}


class MeanMixer(torch.nn.Module):
    """A mixer from outside: every token gets a running mean of those before it."""

    def __init__(self, dim, gain=1.0, device=None, dtype=None):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((dim,), gain, device=device, dtype=dtype))

    def forward(self, x_BLD):
        count = torch.arange(1, x_BLD.shape[1] + 1, dtype=x_BLD.dtype)[:, None]
        return self.gain * x_BLD.cumsum(1) / count


def test_any_mixer_pairs_with_any_scan():
    x, t = inputs()
    outs = []
    for scan_type in ("zigzagN8", "hilbert", "v1"):
        model = tiny(scan_type=scan_type, mixer=MeanMixer, ssm_cfg={"gain": 2.0}).eval()
        assert "blocks.0.mixer.gain" in model.state_dict()
        outs.append(model(x, t))
    assert (outs[0] - outs[1]).abs().max() > 1e-4
    assert (outs[1] - outs[2]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="several at once"):
        tiny(scan_type="parallelN2", mixer=MeanMixer)
