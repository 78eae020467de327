"""Second fixtures of the initialization of ZigMa, DiS, DiM and U-ViT, by its formulas; see make_second_fixtures.py.

Of the project only the names and shapes of weights are taken.
"""

import fnmatch
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.parity import definitions as define
from tests.parity.second_networks import random_state
from tests.parity.second_processes import Maker

# (shape, depth) -> mean and standard deviation.
Rule = Callable[[list[int], int], tuple[float, float]]


def constant(value: float) -> Rule:
    return lambda shape, depth: (value, 0.0)


def normal(std: float) -> Rule:
    return lambda shape, depth: (0.0, std)


def fan_in(shape: list[int]) -> int:
    return math.prod(shape[1:])


def uniform_fan_in(shape: list[int], depth: int) -> tuple[float, float]:
    """PyTorch's default of linear layers and convolutions: uniform in +- 1 / sqrt(inputs)."""
    return 0.0, 1 / math.sqrt(3 * fan_in(shape))


def xavier(shape: list[int], depth: int) -> tuple[float, float]:
    return 0.0, math.sqrt(2 / (shape[0] + fan_in(shape)))


def by_depth(shape: list[int], depth: int) -> tuple[float, float]:
    """A mixer's output, the default over the square root of the depth."""
    return 0.0, uniform_fan_in(shape, depth)[1] / math.sqrt(depth)


def bias_of(inputs: int) -> Rule:
    """The default bias of a layer of so many inputs."""
    return lambda shape, depth: (0.0, 1 / math.sqrt(3 * inputs))


def log_of_states(shape: list[int], depth: int) -> tuple[float, float]:
    """log 1, ..., log N in every channel."""
    return moments(torch.arange(1, shape[1] + 1).double().log().repeat(shape[0]))


def step_bias(shape: list[int], depth: int) -> tuple[float, float]:
    """The inverse of softplus at steps whose logarithm is uniform between those of 1e-3 and 1e-1."""
    steps = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), 100_001, dtype=torch.float64))
    return moments(torch.log(torch.expm1(steps)))


def moments(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item()


MIXER: dict[str, Rule] = {
    "*.A_log": log_of_states, "*.A_b_log": log_of_states, "*.D": constant(1.0), "*.D_b": constant(1.0),
    "*.in_proj.weight": uniform_fan_in, "*.x_proj*.weight": uniform_fan_in, "*.conv1d*.weight": uniform_fan_in,
    # Uniform in +- rank^-1/2, as every linear layer of rank inputs.
    "*.dt_proj*.weight": uniform_fan_in, "*.dt_proj.bias": step_bias, "*.dt_proj_b.bias": constant(0.0),
    "*.out_proj.weight": by_depth,
}  # fmt: skip


def statistics(family: str, kwargs: dict, depth: int, rules: dict[str, Rule]) -> dict[str, dict]:
    """Of every weight by the first rule that its name fits; biases without a rule are 0."""
    stats = {}
    for name, value in random_state(family, kwargs, 0).items():
        rule = next((rule for pattern, rule in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if rule is None:
            assert name.endswith(".bias"), f"no rule for {name}"
            rule = constant(0.0)
        shape = list(value.shape)
        mean, std = rule(shape, depth)
        stats[name] = {"shape": shape, "mean": mean, "std": std}
    return stats


def drawn_zigma(maker: Maker) -> None:
    """Both directions of the scan with labels and LayerNorm; one direction with text and frozen positions."""
    labels = {"in_channels": 3, "embed_dim": 24, "depth": 2, "img_dim": 6, "patch_size": 3, "scan_type": "v2",
              "use_pe": 2, "num_classes": 9, "rms_norm": False, "ssm_cfg": {"d_state": 5, "d_conv": 3}}  # fmt: skip
    text = {"in_channels": 1, "embed_dim": 16, "depth": 3, "img_dim": 4, "patch_size": 2, "scan_type": "zigzagN2",
            "use_pe": 1, "has_text": True, "d_context": 10, "n_context_token": 3}  # fmt: skip
    table = moments(define.sincos_table(2, 16))
    cases = {}
    for name, kwargs, positions in (("labels", labels, (0.0, 0.0)), ("text", text, table)):
        taps = kwargs.get("ssm_cfg", {}).get("d_conv", 4)
        rules = {
            "pos_embed": lambda shape, depth, positions=positions: positions, "x_embedder.proj.weight": xavier,
            "t_embedder.mlp.*.weight": normal(0.02), "y_embedder.embedding_table.weight": normal(0.02),
            "y_embedder.weight": uniform_fan_in, "*.conv1d*.bias": bias_of(taps), **MIXER,
            "*norm*.weight": constant(1.0), "*.adaLN_modulation.1.weight": constant(0.0),
            "*.msa.*.weight": uniform_fan_in, "final_layer.linear.weight": uniform_fan_in,
        }  # fmt: skip
        stats = statistics("zigma", kwargs, kwargs["depth"], rules)
        frozen = {"pos_embed"} if kwargs["use_pe"] == 1 else set()
        stats = {k: {**v, "requires_grad": k not in frozen} for k, v in stats.items()}
        cases[name] = {"ctor_kwargs": kwargs, "params": stats}
    maker.write("zigma_drawn", {"fixture_kind": "zigma.init_stats", **cases})


def drawn_dis(maker: Maker) -> None:
    kwargs = {"img_size": 6, "patch_size": 3, "embed_dim": 24, "depth": 5, "channels": 2, "num_classes": 7,
              "class_dropout_prob": 0.0, "learn_sigma": False}  # fmt: skip
    rules = {
        "pos_embed": constant(0.0), "patch_embed.proj.weight": uniform_fan_in,
        "patch_embed.proj.bias": bias_of(2 * 9), "label_emb.embedding_table.weight": normal(0.02),
        "*.conv1d*.bias": bias_of(4), **MIXER, "*norm*.weight": constant(1.0), "*.weight": uniform_fan_in,
    }  # fmt: skip
    stats = statistics("dis", kwargs, kwargs["depth"], rules)
    maker.write("dis_drawn", {"fixture_kind": "dis.init_stats", "kwargs": kwargs, "stats": stats})


def drawn_dim(maker: Maker) -> None:
    kwargs = {
        "norm_type": "ada_norm_single", "patch_size": 3, "mamba_d_state": 6, "mamba_d_conv": 4, "mamba_expand": 1,
        "mamba_type": "enc", "is_uconnect": True, "no_ff": True, "is_extra_tokens": True, "rms": True,
        "use_pad_token": True, "use_a4m_adapter": True, "encoder_start_blk_id": 1, "use_adapter_modules": True,
        "pad_token_schedules": ["dec_split", "rho_pad"], "pos_encoding_type": "learnable", "scan_pattern_len": 3,
        "attention_head_dim": 16, "num_attention_heads": 3, "num_layers": 3, "in_channels": 2, "out_channels": 2,
        "num_embeds_ada_norm": 6, "sample_size": 6, "mlp_time_embed": True,
    }  # fmt: skip
    width = 48
    rules = {
        "additional_embed": constant(0.0), "pos_embed.proj.weight": uniform_fan_in,
        "pos_embed.proj.bias": bias_of(2 * 9), "*.scale_shift_table": normal(width**-0.5),
        "adaln_single.emb.timestep_embedder.*.weight": normal(0.02), "*embedding_table.weight": normal(0.02),
        "label_emb.weight": normal(0.02), "a4m_adapter.pad_token*": normal(0.02),
        "a4m_adapter.*_smoother.bias": bias_of(9), "*.conv1d.bias": bias_of(4), **MIXER,
        "*norm.weight": constant(1.0), "*.weight": uniform_fan_in,
    }  # fmt: skip
    stats = statistics("dim", kwargs, kwargs["num_layers"], rules)
    maker.write("dim_drawn", {"fixture_kind": "dim.init_stats", "kwargs": kwargs, "stats": stats})


def drawn_uvit(maker: Maker) -> None:
    """Labels, other sizes; text, told by its keywords."""
    rules = {
        "patch_embed.proj.weight": uniform_fan_in, "final_layer.weight": uniform_fan_in,
        "label_emb.weight": normal(1.0), "*norm*.weight": constant(1.0),
        # Truncated at +- 2, which is never reached.
        "pos_embed": normal(0.02), "*.weight": normal(0.02),
    }  # fmt: skip
    shared = {"patch_size": 3, "in_chans": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2}
    labels = {**shared, "img_size": 9, "depth": 4, "num_classes": 6, "mlp_time_embed": True, "qkv_bias": True}
    text = {**shared, "img_size": 6, "depth": 2, "clip_dim": 10, "num_clip_token": 3, "conv": False}
    for name, family, kwargs in (("labels", "uvit", labels), ("text", "uvit_t2i", text)):
        own = {"patch_embed.proj.bias": bias_of(2 * 9), "final_layer.bias": bias_of(2 * 9), **rules}
        stats = statistics(family, kwargs, kwargs["depth"], own)
        told = {"kwargs": kwargs} if family == "uvit_t2i" else {}
        maker.write(f"uvit_drawn_{name}", {"fixture_kind": "uvit.init_stats", **told, **stats})


DRAWN = (drawn_zigma, drawn_dis, drawn_dim, drawn_uvit)
