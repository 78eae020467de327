"""The published constructors' keywords: each is accepted at its published default, or refused by its name."""

import pytest
import torch
from torch import nn

from zigflow.official import FAMILIES, load_official, official_arguments

# The published signatures with their defaults.
_TRANSFORMER = {
    "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0,
    "qkv_bias": False, "qk_scale": None, "norm_layer": nn.LayerNorm, "mlp_time_embed": False, "use_checkpoint": False,
    "conv": True, "skip": True,
}  # fmt: skip
_DIT = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True,
}  # fmt: skip
SIGNATURES = {
    "zigma": {
        "in_channels": 4, "embed_dim": 64, "depth": 2, "img_dim": 8, "patch_size": 1, "has_text": False,
        "num_classes": -1, "drop_path_rate": 0.1, "n_context_token": 0, "d_context": 0, "ssm_cfg": None,
        "norm_epsilon": 1e-5, "rms_norm": True, "fused_add_norm": True, "residual_in_fp32": True,
        "initializer_cfg": None, "scan_type": "v2", "video_frames": 0, "tpe": False, "device": "cuda", "use_pe": 0,
        "use_jit": True, "m_init": True, "use_checkpoint": False, "dtype": torch.float32,
    },
    "dis": {
        "img_size": 224, "patch_size": 16, "embed_dim": 192, "channels": 3, "depth": 12, "num_classes": -1,
        "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.1, "norm_epsilon": 1e-5, "rms_norm": True,
        "initializer_cfg": None, "fused_add_norm": True, "residual_in_fp32": True, "device": None, "dtype": None,
        "bimamba_type": "v2", "learn_sigma": True, "if_cls_token": False, "mlp_time_embed": True, "conv": True,
        "skip": True, "class_dropout_prob": 0.1,
    },
    # Where a default of the signature is another network than any published configuration, the value of those.
    "dim": {
        "num_attention_heads": 16, "attention_head_dim": 88, "patch_size": 2, "sample_size": 8, "num_layers": 5,
        "norm_type": "ada_norm_single", "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
        "use_bidirectional_rnn": False, "mamba_type": "enc", "nested_order": 0, "is_uconnect": True, "no_ff": True,
        "ff_dim_mult": 4, "in_channels": 3, "use_reverse": False, "mlp_time_embed": False, "is_extra_tokens": True,
        "use_conv1d": False, "use_pad_token": True, "rms": True, "conv_dilation": 1, "drop_path_rate": 0.0,
        "use_a4m_adapter": True, "apply_adapter_last_linear": False, "encoder_start_blk_id": 1,
        "num_2d_enc_dec_layers": 0, "kv_as_one_token_idx": -1, "is_adapter_proj_in": False, "use_final_conv": False,
        "pad_token_schedules": ["dec_split", "lateral"], "is_absorb": False, "use_adapter_modules": True,
        "nocat": False, "sequence_schedule": "reverse_concat", "sub_sequence_schedule": ["simple"],
        "pos_encoding_type": "learnable", "tkn_conv_dilated_rate": 1, "scan_pattern_len": 3,
        "is_align_exchange_q_kv": False, "is_random_patterns": False, "multi_times": 1, "pattern_type": "base",
        "drop_rate": 0, "pad_token_len": None, "is_doubel_extra_tokens": False, "num_patches": None,
        "is_freeu": False, "is_skip_tune": False, "freeu_param": (0.3, 0.2, 1.1, 1.2), "skip_tune_param": (0.82, 1.0),
        "is_difffit": False, "num_embeds_ada_norm": 10, "out_channels": None, "dropout": 0.0, "norm_num_groups": 32,
        "cross_attention_dim": None, "attention_bias": False, "num_vector_embeds": None, "activation_fn": "geglu",
        "use_linear_projection": False, "only_cross_attention": False, "double_self_attention": False,
        "upcast_attention": False, "norm_elementwise_affine": True, "norm_eps": 1e-5, "attention_type": "default",
        "caption_channels": None,
    },
    "dit": _DIT,
    "sit": _DIT,
    "uvit": {**_TRANSFORMER, "num_classes": -1},
    "uvit_t2i": {**_TRANSFORMER, "clip_dim": 768, "num_clip_token": 77},
}  # fmt: skip
# What must be there for a model to be meant; the rest may be left out.
_NEEDED = {
    "zigma": ("in_channels", "embed_dim", "depth", "img_dim"),
    "dim": ("num_attention_heads", "patch_size", "sample_size", "num_layers", "num_embeds_ada_norm"),
}


def base(family):
    return {name: SIGNATURES[family][name] for name in _NEEDED.get(family, ())}


def shapes(family, given):
    import importlib

    module, _, name = FAMILIES[family].target.rpartition(".")
    with torch.device("meta"):
        model = getattr(importlib.import_module(module), name)(**official_arguments(family, given))
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_every_family_has_its_signature_here():
    assert set(SIGNATURES) == set(FAMILIES)
    for family, signature in SIGNATURES.items():
        extra = {"dim": {"name", "pretrained_path"}, "uvit": {"name"}, "uvit_t2i": {"name"}}
        assert set(signature) == set(FAMILIES[family].keywords) - extra.get(family, set()), family


@pytest.mark.parametrize("family", SIGNATURES)
def test_published_defaults_are_accepted_and_are_what_is_meant_when_left_out(family):
    everything = official_arguments(family, SIGNATURES[family])
    for name, value in SIGNATURES[family].items():
        official_arguments(family, {**base(family), name: value})
    # One of them after the other left out: the same network.
    small = {
        "embed_dim": 64,
        "hidden_size": 64,
        "attention_head_dim": 4,
        "depth": 2,
        "num_heads": 4,
        "num_layers": 5,
    }
    given = {**SIGNATURES[family], **{k: v for k, v in small.items() if k in SIGNATURES[family]}}
    want = shapes(family, given)
    needed = (*base(family), *(name for name in small if name in given))
    assert shapes(family, {name: given[name] for name in needed}) == want
    assert everything


OTHER = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.05, str: lambda v: v + "x"}


@pytest.mark.parametrize("family", SIGNATURES)
def test_another_value_is_served_or_refused_by_name(family):
    """No published keyword disappears: it changes what is built, or is refused, or is known to have no effect."""
    signature = SIGNATURES[family]
    needed = {**base(family), **({"num_classes": 3} if family == "dis" else {})}
    plain = official_arguments(family, {**signature, **needed})
    for name, keyword in FAMILIES[family].keywords.items():
        value = signature.get(name)
        if type(value) not in OTHER:
            continue
        other = OTHER[type(value)](value)
        given = {**signature, **needed, name: other}
        if keyword.values is not None:
            with pytest.raises(ValueError, match=rf"^{name}=[^\n]*$"):
                official_arguments(family, given)
            continue
        changed = official_arguments(family, given) != plain
        if name == "scan_pattern_len":
            continue  # more than all directions are all of them
        assert changed == bool(keyword.to), name


@pytest.mark.parametrize(
    "family, given, message",
    [
        ("dim", {"norm_type": "layer_norm"}, "norm_type='layer_norm' of dim is not served, only 'ada_norm_single'"),
        ("dim", {"is_doubel_extra_tokens": True}, "is_doubel_extra_tokens=True"),
        ("dim", {"drop_rate": 0.1}, "drop_rate=0.1"),
        ("dim", {"is_uconect": True}, "Did you mean 'is_uconnect'"),
        ("dis", {"bimamba_type": "v1"}, "'v2' alone"),
        ("dis", {"dtype": torch.bfloat16}, "float32; cast the module"),
        ("dit", {"hidden_sise": 32}, "Did you mean 'hidden_size'"),
        ("dit", {"hidden_size": 32, "embed_dim": 32}, "hidden_size and embed_dim are one keyword"),
        ("sit", {"depht": 2}, "Did you mean 'depth'"),
        ("uvit", {"qk_scale": 1.0}, "qk_scale=1.0 of uvit is not served, only None"),
        ("uvit", {"norm_layer": nn.Identity}, "norm_layer"),
        ("uvit_t2i", {"clipdim": 16}, "Did you mean 'clip_dim'"),
        ("zigma", {"scan_typ": "v2"}, "Did you mean 'scan_type'"),
    ],
)  # fmt: skip
def test_unknown_keywords_and_refused_values_are_named(family, given, message):
    with pytest.raises(ValueError, match=message):
        load_official(family, {**base(family), **given}, {})


def test_our_keywords_are_checked_too():
    with pytest.raises(ValueError, match=r"unknown keyword of zigma 'scan_sed'.*scan_seed"):
        load_official("zigma", base("zigma"), {}, scan_sed=1)
    # Translated keywords pass through once more unchanged, as a converted configuration does.
    for family, signature in SIGNATURES.items():
        once = official_arguments(family, signature)
        assert official_arguments(family, once) == once, family


def test_guidance_of_few_channels_is_the_published_slice():
    """The first three channels of the output, of which there may be fewer."""
    for channels, sigma, guided in ((1, False, 1), (1, True, 2), (2, True, 3), (4, True, 3)):
        for family, name in (("dit", "in_channels"), ("dis", "channels")):
            given = official_arguments(family, {name: channels, "learn_sigma": sigma})
            assert given["guided_channels"] == guided
    assert official_arguments("sit", {"in_channels": 2})["guided_channels"] == 2
