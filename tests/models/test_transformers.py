"""What DiT, U-ViT, DiS and DiM have in common: compilation, checkpointing, sizes, conditions, precision, errors."""

import pytest
import torch

from tests.assertions import BF16_RELATIVE_RMS, assert_close, assert_relative_rms
from tests.models.transformers import filled, inputs, run
from zigflow.keyed import KeyedDraws
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.nn import Condition
from zigflow.samplers.guidance import Guided

SIZE = {"in_channels": 2, "img_dim": (4, 6), "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
TEXT = {"has_text": True, "d_context": 6, "n_context_token": 5, "class_dropout_prob": 0.3}
LABELS = {"num_classes": 3, "class_dropout_prob": 0.3}


def dim(num_heads, **options):
    return DiM(**{**options, **DIM})


DIM = {"depth": 5, "ssm_cfg": {"d_state": 4}}
SPLIT = {
    "pad_layout": "rho_pad",
    "split_skip": True,
    "official_skip_tuning": "as_intended",
    "scan": "hilbert",
}
CASES = {
    "dim": (dim, LABELS),
    "dim-split": (dim, {**LABELS, **SPLIT}),
    "dit": (DiT, LABELS),
    "dit-text": (DiT, TEXT),
    "dit-rope": (DiT, {**LABELS, "qk_norm": True, "rope": True}),
    "sit": (DiT, {**LABELS, "drop_sigma": True}),
    "uvit": (UViT, LABELS),
    "uvit-text": (UViT, TEXT),
    "uvit-rope": (UViT, {**LABELS, "qk_norm": True, "rope": True, "mlp_time_embed": True, "qkv_bias": True}),
    "uvit-plain": (UViT, {"skip": False, "conv": False}),
    "dis": (DiS, {**LABELS, "drop_path_rate": 0.0}),
    "dis-scan": (DiS, {**LABELS, "drop_path_rate": 0.0, "scan": "zigzag", "learn_sigma": False}),
    "dis-plain": (DiS, {"skip": False, "mlp_time_embed": False, "rms_norm": False}),
}
CONDITIONED = [case for case in CASES if case not in ("uvit-plain", "dis-plain")]


def tiny(case, **changes):
    torch.manual_seed(0)
    family, options = CASES[case]
    size = {k: v for k, v in SIZE.items() if k != "num_heads" or family is not DiS}
    return filled(family(**{**size, **options, **changes}))


@pytest.mark.parametrize("policy", ["block", "selective"])
@pytest.mark.parametrize("case", CASES)
def test_checkpointed_equals_plain(case, policy):
    model = tiny(case).train()
    want, want_gradients = run(model)
    model.set_checkpoint_policy(policy)
    got, gradients = run(model)
    assert torch.equal(got, want)
    assert gradients.keys() == want_gradients.keys()
    for name in gradients:
        assert torch.equal(gradients[name], want_gradients[name]), name
    with pytest.raises(KeyError, match="selective"):
        model.set_checkpoint_policy("selectiv")


def test_the_published_keyword_sets_the_policy():
    assert tiny("dit", use_checkpoint=True).blocks[0].checkpoint_policy == "block"
    assert tiny("uvit", use_checkpoint=True).mid_block.checkpoint_policy == "block"


@pytest.mark.parametrize("case", ["dit", "dit-text", "uvit", "uvit-rope", "dis", "dis-scan", "dis-plain"])
def test_compiled_equals_eager_with_at_most_three_graphs(case):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny(case).train()
    keys = list(model.state_dict())
    want, want_gradients = run(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter)
    got, gradients = run(model)
    assert 1 <= counter.frame_count <= 3
    assert list(model.state_dict()) == keys
    assert_close("out", got, want)
    for name in want_gradients:
        assert_close(name, gradients[name], want_gradients[name], of_max=1e-3)


def test_a_compiled_model_trains_and_then_samples_at_any_size():
    """More graphs than Dynamo keeps by default, where one more is an error."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, eager = tiny("dim"), tiny("dim").eval()
    counter = CompileCounterWithBackend("eager")
    model.compile_blocks(backend=counter)
    run(model.train())
    model.eval()
    for batch, size in ((2, (4, 6)), (3, (8, 4)), (5, (6, 6))):
        given = inputs(model, batch, size)
        with torch.no_grad():
            assert_close(f"{batch} x {size}", model(*given), eager(*given))
    assert counter.frame_count > 8


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter(case):
    model = tiny(case).train()
    gradients = run(model, batch=8)[1]
    assert set(gradients) == {"x"} | {k for k, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (2, 10)])
def test_other_sizes_than_built_for(case, size):
    model = tiny(case).eval()
    x, t, y = inputs(model, size=size)
    out = model(x, t, y)
    assert out.shape == (2, model.out_channels, *size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("case", ["dim", "dit-rope", "uvit", "dis-scan"])
def test_a_size_first_seen_in_inference_mode_can_be_trained_on(case):
    model = tiny(case)
    given = inputs(model, size=(8, 4))
    with torch.inference_mode():
        model.eval()(*given)
    model.train()(*given).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["dit", "dit-rope", "uvit", "uvit-rope"])
def test_positions_follow_the_image_and_not_the_token_number(case):
    """With the axes of its kernels, table and rotations exchanged, a model sees the exchanged image."""
    model, turned = tiny(case, img_dim=(4, 6)).eval(), tiny(case, img_dim=(6, 4)).eval()
    state = model.state_dict()
    extras = getattr(model, "extras", 0)
    table = state["pos_embed"][:, extras:].reshape(2, 3, -1).transpose(0, 1).reshape(1, 6, -1)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :extras], table], dim=1)
    head = "final_layer.linear" if case.startswith("dit") else "decoder_pred"
    channels = getattr(model, "head_channels", model.in_channels)
    for name in list(state):
        if name.endswith("embedder.proj.weight") or name in ("patch_embed.proj.weight", "final_layer.weight"):
            state[name] = state[name].transpose(-1, -2)
        elif name.startswith(head):
            shape = state[name].shape
            state[name] = state[name].reshape(2, 2, channels, -1).transpose(0, 1).reshape(shape)
    if "rope" in case:
        # The head's halves are the two axes.
        for name in [k for k in state if k.endswith(("attn.qkv.weight", "attn.qkv.bias"))]:
            qkv = state[name].reshape(3, 2, 2, 4, -1).clone()
            qkv[:2] = qkv[:2].flip(2)
            state[name] = qkv.reshape(state[name].shape)
        for name in [k for k in state if k.endswith(("q_norm.weight", "k_norm.weight"))]:
            state[name] = state[name].reshape(2, 4).flip(0).flatten()
    turned.load_state_dict(state)
    x, t, y = inputs(model)
    want = model(x, t, y)
    assert_close("turned", turned(x.transpose(-1, -2), t, y).transpose(-1, -2), want, of_max=1e-5)
    assert (tiny(case, img_dim=(6, 4)).eval()(x.transpose(-1, -2), t, y).mT - want).abs().max() > 1e-3


@pytest.mark.parametrize("case", CONDITIONED)
def test_dropout_of_the_condition_follows_the_keys_not_the_batch(case):
    model = tiny(case, class_dropout_prob=0.5).train()
    x, t, y = inputs(model, batch=8)
    ids = torch.arange(100, 108)
    with KeyedDraws(7, ids).active():
        whole = model(x, t, y)
    with KeyedDraws(7, ids[2:4]).active():
        part = model(x[2:4], t[2:4], y[2:4])
    assert_close("rows", part, whole[2:4], of_max=1e-5)
    with KeyedDraws(8, ids).active():
        other = model(x, t, y)
    assert (other - whole).abs().max() > 1e-3
    # Each row is the conditional or the unconditional output, and both occur.
    model.eval()
    given, null = model(x, t, y), model(x, t, model.null_condition(y))
    kept = (whole - given).flatten(1).abs().amax(1) < 1e-5
    dropped = (whole - null).flatten(1).abs().amax(1) < 1e-5
    assert (kept ^ dropped).all()
    assert kept.any() and dropped.any()


@pytest.mark.parametrize("case", CONDITIONED)
def test_null_condition_stands_for_none_and_guides(case):
    model = tiny(case).eval()
    x, t, y = inputs(model)
    null = model.null_condition(y)
    assert_close("no condition", model(x, t), model(x, t, null), of_max=1e-6)
    part = "tokens" if model.has_text else "labels"
    held = model.null_condition(Condition(**{part: y}))
    assert torch.equal(getattr(held, part), null)
    with pytest.raises(ValueError, match=rf"Condition\({part}=\.\.\.\)"):
        model.null_condition(Condition())
    cond, uncond = model(x, t, y), model(x, t, null)
    guided = Guided(model, 3.0, channels=model.guided_channels)(x, t, y)
    own = slice(0, model.guided_channels)
    assert_close("guided", guided[:, own], (uncond + 3 * (cond - uncond))[:, own], of_max=1e-5)
    rest = slice(model.guided_channels, None)
    assert_close("variance", guided[:, rest], cond[:, rest], of_max=1e-5)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        tiny(case, class_dropout_prob=0.0).null_condition(y)


@pytest.mark.parametrize("case", ["dit-text", "uvit-text"])
def test_masks_of_text(case):
    model = tiny(case).eval()
    x, t, y = inputs(model)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    changed = y.clone()
    changed[0, 3:] += 1
    want = model(x, t, Condition(tokens=y, mask=mask))
    assert_close(
        "masked tokens are not read", model(x, t, Condition(tokens=changed, mask=mask)), want, of_max=1e-6
    )
    assert (model(x, t, changed) - model(x, t, y)).abs().max() > 1e-4
    # The null text counts whole, in guidance and where it replaces a text in training.
    null = model.null_condition(Condition(tokens=y, mask=mask))
    assert null.mask.all()
    assert_close("null", model(x, t, null), model(x, t), of_max=1e-6)
    model.train()
    model.class_dropout_prob = 0.999999
    with KeyedDraws(0, torch.arange(2)).active():
        assert_close("dropped", model(x, t, Condition(tokens=y, mask=mask)), model(x, t, null), of_max=1e-6)


# Of DiS and DiM in their own files, as they are initialized: a recurrence of the weights drawn here amplifies rounding.
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("dis", "dim"))])
def test_bfloat16_weights_and_autocast_stay_close(case):
    model = tiny(case).eval()
    x, t, y = inputs(model, batch=4)
    want = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x, t, y)
    assert_relative_rms("autocast", got.float(), want, BF16_RELATIVE_RMS)
    model.bfloat16()
    got = model(x, t, y)
    assert got.dtype == torch.bfloat16
    assert_relative_rms("weights", got.float(), want, 2 * BF16_RELATIVE_RMS)


@pytest.mark.parametrize("case", ["dit", "uvit"])
def test_attention_runs_in_the_dtype_of_the_weights(case, monkeypatch):
    import torch.nn.functional as F

    seen = set()
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.update({q.dtype, k.dtype, v.dtype})
        return plain(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = tiny(case, qk_norm=True, rope=True).bfloat16().eval()
    model(*inputs(model))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("case", CASES)
def test_features(case):
    model = tiny(case).eval()
    given = inputs(model)
    names = ("blocks.0", "blocks.3") if case.startswith(("dit", "sit")) else ("mid_block", "out_blocks.1")
    if case.startswith("dim"):
        names = ("transformer_blocks.1", "transformer_blocks.4")
    out, features = model(*given, return_features=names)
    assert torch.equal(out, model(*given))
    # DiM has three pads after each row and three rows of them.
    tokens = 5 + 5 * 6 if case.startswith("dim") else 6 + getattr(model, "extras", 0)
    assert {k: v.shape for k, v in features.items()} == dict.fromkeys(names, (2, tokens, 16))
    with pytest.raises(KeyError, match="block"):
        model(*given, return_features=("block.1",))


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_explained_in_one_line(case):
    model = tiny(case).eval()
    x, t, y = inputs(model)
    bad = [
        ((x[:, :1], t, y), "C=2"),
        ((x.unsqueeze(1), t, y), "C=2"),
        ((x, t[:1], y), "one time per sample"),
        ((x[..., :3], t, y), "multiples of 2"),
        ((x[:0], t[:0], None), "a batch of 0 samples"),
    ]
    if model.num_classes > 0:
        bad += [
            ((x, t, torch.rand(2)), "class labels"),
            ((x, t, torch.tensor([0, 9])), r"0 to 9.*num_classes=3.*labels 0\.\.2.*num_classes=10"),
            ((x, t, torch.tensor([-1, 0])), r"-1 to 0.*labels 0\.\.2, or 3 for no class$"),
            ((x, t, torch.tensor([True, False])), r"integers \(2,\), got \(2,\) torch.bool"),
            ((x, t, [0, 1]), r"integers \(2,\), got \[0, 1\]"),
        ]
    if model.has_text:
        bad += [
            ((x, t, y[..., :2]), r"tokens \(2, 5, 6\)"),
            ((x, t, y[:, :2]), r"tokens \(2, 5, 6\)"),
            ((x, t, torch.tensor([0, 1])), r"tokens \(2, 5, 6\), got \(2,\)"),
            (
                (x, t, Condition(tokens=y, mask=torch.ones(2, 5))),
                r"bool \(2, 5\).*got \(2, 5\) torch.float32",
            ),
            ((x, t, Condition(tokens=y, mask=torch.ones(2, 3).bool())), r"bool \(2, 5\).*got \(2, 3\)"),
        ]
    for given, message in bad:
        with pytest.raises(ValueError, match=message) as refused:
            model(*given)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", [DiT, UViT])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depth": -1}, "depth is at least"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"img_dim": 5}, "divisible"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
        ({"class_dropout_prob": 0.1, "num_classes": -1}, "num_classes or has_text"),
        ({"has_text": True}, "d_context"),
        ({"has_text": True, "d_context": 4, "class_dropout_prob": 0.1}, "n_context_token"),
        ({"rope": True, "num_heads": 8}, "divisible by 4"),
        ({"embd_dim": 3}, "embd_dim"),
    ],
)
def test_wrong_construction_is_explained(family, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        family(**{**SIZE, "num_classes": 3, **kwargs})


def test_rotary_positions_depend_on_differences_alone():
    from zigflow.nn import axial_rotations, rotate

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).expand(2, 1, 1, 31, 8)
    table = axial_rotations((5, 6), (5, 6), 8, extras=1)
    assert table.shape == (2, 31, 8)
    products = (rotate(q, table) @ rotate(k, table).mT)[0, 0]
    assert_close("extras stay", rotate(q, table)[0, 0, 0], q[0, 0, 0])
    grid = products[1:, 1:].reshape(5, 6, 5, 6)
    assert_close("shifted", grid[1:, 2:, 1:, 2:], grid[:-1, :-2, :-1, :-2], of_max=1e-5)
    assert (grid[0, 0, 0, 1] - grid[0, 0, 1, 0]).abs() > 1e-3
    # On a finer grid the built one is covered by more tokens.
    fine = axial_rotations((5, 6), (10, 12), 8)
    middle = torch.atan2(fine[1], fine[0]).reshape(10, 12, 8)
    assert_close("column step", middle[0, 1, 0] - middle[0, 0, 0], torch.tensor(0.5))
