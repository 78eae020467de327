"""The mixers: names and shapes of the official checkpoints, initial values, and what each computes."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dis_mamba import BiMambaMixer, MambaMixer, ParallelMambaMixer
from tests.assertions import assert_close, assert_relative_rms

from .definitions import conv_definition, scan_definition

ZIGMA = Path(__file__).parents[1] / "parity/fixtures/zigma"
PREFIX = "blocks.0.mixer."

MANIFESTS = {
    "zigzag8_b1_pe2": lambda: MambaMixer(768, device="meta"),
    "sweep2_b1_pe2": lambda: BiMambaMixer(768, device="meta"),
    "parallelN8_tiny_constructor_only": lambda: ParallelMambaMixer(16, num_orders=8, device="meta"),
}


def orders(k, L):
    return torch.stack([torch.randperm(L) for _ in range(k)])


def shapes(named):
    return [(name, list(tensor.shape)) for name, tensor in named]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_parameters_are_those_of_the_official_checkpoints(manifest):
    stored = json.loads((ZIGMA / f"manifests/{manifest}.json").read_text())
    want = [(k.removeprefix(PREFIX), v["shape"]) for k, v in stored["params"].items() if k.startswith(PREFIX)]
    mixer = MANIFESTS[manifest]()
    assert shapes(mixer.named_parameters()) == want
    assert all(p.requires_grad for p in mixer.parameters())
    second = [
        k.removeprefix(PREFIX) for k in stored["state_dict_keys_not_parameters"] if k.startswith(PREFIX)
    ]
    assert set(mixer.state_dict()) == {name for name, _ in want} | set(second)
    if stored["state_dict_order_equals_param_order"]:
        assert list(mixer.state_dict()) == [name for name, _ in want]


@pytest.mark.parametrize("model,kind", [("zigzagN8_text_pe1", MambaMixer), ("v2_class_pe2", BiMambaMixer)])
def test_initial_values_follow_the_official_statistics(model, kind):
    stored = json.loads((ZIGMA / "init_stats.json").read_text())[model]
    options = {} if kind is MambaMixer else {"official_backward_dt_init": True}
    mixer = kind(stored["ctor_kwargs"]["embed_dim"], **options)
    for name, p in mixer.named_parameters():
        want = stored["params"][PREFIX + name]
        assert list(p.shape) == want["shape"]
        if name in ("out_proj.weight", "dt_proj_b.bias"):
            continue  # the model initializes these two again
        if name.startswith(("A_", "D")):
            assert [p.min().item(), p.max().item()] == pytest.approx([want["min"], want["max"]], rel=1e-6)
            assert p.mean().item() == pytest.approx(want["mean"], rel=1e-6)
        else:
            # Standard error of the difference of two sample standard deviations of a uniform variable.
            error = want["std"] * math.sqrt(0.8 / 4 / p.numel()) * math.sqrt(2)
            assert abs(p.std().item() - want["std"]) <= 5 * error, name
            assert abs(p.mean().item() - want["mean"]) <= 5 * want["std"] * math.sqrt(2 / p.numel()), name


@pytest.mark.parametrize("official", [False, True])
def test_step_bias_of_the_backward_directions(official):
    bi = BiMambaMixer(64, official_backward_dt_init=official)
    many = ParallelMambaMixer(64, num_orders=3, official_backward_dt_init=official)
    for dt_proj in (bi.dt_proj_b, *many.dt_proj_b_list):
        step = F.softplus(dt_proj.bias)
        assert (step.max() <= 0.1001).item() is not official
        assert getattr(dt_proj.bias, "_no_reinit", False) is not official
        assert dt_proj.weight.abs().max() <= 0.5
    for dt_proj in (bi.dt_proj, many.dt_proj, MambaMixer(64).dt_proj):
        step = F.softplus(dt_proj.bias)
        assert 1e-3 * 0.999 <= step.min() <= step.max() <= 0.1 * 1.001
        assert dt_proj.bias._no_reinit


def test_step_options():
    mixer = MambaMixer(64, dt_init="constant", dt_scale=2.0, dt_min=0.5, dt_max=0.5)
    assert torch.equal(mixer.dt_proj.weight, torch.full((128, 4), 1.0))
    assert_close("step", F.softplus(mixer.dt_proj.bias), torch.full((128,), 0.5), of_max=1e-6)
    floor = MambaMixer(16, dt_min=1e-6, dt_max=1e-6, dt_init_floor=1e-3)
    assert_close("floor", F.softplus(floor.dt_proj.bias), torch.full((32,), 1e-3), of_max=1e-4)


@pytest.mark.parametrize("kind", [MambaMixer, BiMambaMixer])
def test_state_parameters_are_tagged_and_stay_float32(kind):
    mixer = kind(16, dtype=torch.bfloat16)
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    tagged = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert tagged == {
        name for name, _ in mixer.named_parameters() if name in ("A_log", "D", "A_b_log", "D_b")
    }
    assert all(mixer.get_parameter(name).dtype == torch.float32 for name in tagged)


def test_options_change_shapes():
    mixer = MambaMixer(30, d_state=5, d_conv=3, expand=3, conv_bias=False, bias=True)
    assert mixer.dt_rank == 2
    assert shapes(mixer.named_parameters()) == [
        ("A_log", [90, 5]),
        ("D", [90]),
        ("in_proj.weight", [180, 30]),
        ("in_proj.bias", [180]),
        ("conv1d.weight", [90, 1, 3]),
        ("x_proj.weight", [12, 90]),
        ("dt_proj.weight", [90, 2]),
        ("dt_proj.bias", [90]),
        ("out_proj.weight", [30, 90]),
        ("out_proj.bias", [30]),
    ]
    assert mixer(torch.randn(2, 7, 30)).shape == (2, 7, 30)


@pytest.mark.parametrize("kind", [MambaMixer, BiMambaMixer])
@pytest.mark.parametrize(
    "options,error,message",
    [
        (
            {"d_stat": 8},
            TypeError,
            r"'d_stat' \(did you mean 'd_state'\?\). Allowed: d_state, d_conv, expand",
        ),
        ({"dt_rank": "automatic"}, ValueError, "dt_rank = 'automatic': expected 'auto' or a number"),
        ({"d_state": 0}, ValueError, "d_state = 0: expected at least 1"),
        ({"dt_init": "randm"}, ValueError, "unknown dt_init 'randm', expected 'random' or 'constant'"),
        ({"dt_min": 0.5}, ValueError, "dt_min = 0.5 and dt_max = 0.1: expected 0 < dt_min <= dt_max"),
    ],
)
def test_mixers_refuse(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(16, **options)


def direction(x, conv, x_proj, dt_proj, A_log, D, reverse=False):
    """One direction from the formulas, in float64, before the gate."""
    rank, states = dt_proj.weight.shape[1], A_log.shape[1]
    u = conv_definition(x, conv.weight[:, 0], conv.bias, "silu", reverse)
    dt, B, C = F.linear(u, x_proj.weight.double()).split([rank, states, states], -1)
    delta = F.linear(dt, dt_proj.weight.double()) + dt_proj.bias.double()
    return scan_definition(u, delta, -A_log.double().exp(), B, C, D, delta_softplus=True, reverse=reverse)


def test_one_direction():
    mixer = MambaMixer(12, d_state=4)
    tokens = torch.randn(2, 40, 12)
    x, z = F.linear(tokens.double(), mixer.in_proj.weight.double()).chunk(2, -1)
    y = direction(x, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    assert_close(
        "output", mixer(tokens), F.linear(y * F.silu(z), mixer.out_proj.weight.double()), of_max=1e-5
    )


def test_two_directions_are_summed_and_gated_once():
    mixer = BiMambaMixer(12, d_state=4)
    tokens = torch.randn(2, 40, 12)
    x, z = F.linear(tokens.double(), mixer.in_proj.weight.double()).chunk(2, -1)
    y = direction(x, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    y = y + direction(
        x, mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b, reverse=True
    )
    assert_close(
        "output", mixer(tokens), F.linear(y * F.silu(z), mixer.out_proj.weight.double()), of_max=1e-5
    )


def test_parallel_branches_walk_their_orders_with_their_weights():
    walks = orders(3, 20)
    mixer = ParallelMambaMixer(12, walks, d_state=4).eval()
    tokens = torch.randn(2, 20, 12)
    x, z = F.linear(tokens.double(), mixer.in_proj.weight.double()).chunk(2, -1)
    y = direction(x[:, walks[0]], mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    y = y[:, walks[0].argsort()]
    for i in (1, 2):
        lists = (
            mixer.conv1d_b_list,
            mixer.x_proj_b_list,
            mixer.dt_proj_b_list,
            mixer.A_b_log_list,
            mixer.D_b_list,
        )
        y = y + direction(x[:, walks[i]], *(entries[i - 1] for entries in lists))[:, walks[i].argsort()]
    want = F.linear(y * F.silu(z), mixer.out_proj.weight.double())
    assert_close("output", mixer(tokens), want, of_max=1e-5)
    later = ParallelMambaMixer(12, num_orders=3, d_state=4)
    later.load_state_dict(mixer.state_dict())
    assert torch.equal(later(tokens, walks), mixer(tokens))


def test_parallel_gives_every_parameter_a_gradient():
    mixer = ParallelMambaMixer(8, orders(3, 5), d_state=2)
    mixer(torch.randn(1, 5, 8)).square().sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    spare = {
        id(p) for p in (mixer.A_b_log, mixer.D_b, *mixer.conv1d_b.parameters(), *mixer.dt_proj_b.parameters())
    }
    spare.add(id(mixer.x_proj_b.weight))
    for name, p in mixer.named_parameters():
        assert p.grad is not None
        assert p.grad.any().item() is (id(p) not in spare), name


def test_parallel_loads_files_with_either_name_of_the_last_set():
    mixer = ParallelMambaMixer(8, num_orders=2)
    state = {f"m.{name}": value for name, value in mixer.state_dict().items()}
    second = [name for name in state if "_list.1" in name]
    first = [name.replace("_list.1", "") for name in second]
    assert len(first) == 7
    for dropped in ([], first, second):
        other = torch.nn.ModuleDict({"m": ParallelMambaMixer(8, num_orders=2)})
        other.load_state_dict({name: value for name, value in state.items() if name not in dropped})
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        both = [first[0], second[0]]
        other.load_state_dict({name: value for name, value in state.items() if name not in both})


def test_parallel_keeps_its_orders_out_of_the_state_dict_and_moves_them():
    walks = orders(2, 5)
    mixer = ParallelMambaMixer(8, walks)
    assert not any("order" in name or "inverse" in name for name in mixer.state_dict())
    assert torch.equal(mixer.orders, walks)
    assert mixer.to("meta").orders.is_meta


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({}, r"give orders \(k,L\), or their number"),
        ({"orders": torch.arange(5)}, r"expected \(k,L\) int64, got \(5,\)"),
        ({"orders": torch.ones(2, 5)}, r"expected \(k,L\) int64"),
        ({"orders": torch.tensor([[0, 1, 2], [0, 2, 2]])}, r"rows \[1\] are no permutations"),
        ({"orders": torch.tensor([[1, 2, 3]])}, r"rows \[0\] are no permutations"),
        (
            {"orders": torch.tensor([[0, 1]]), "num_orders": 2},
            r"num_orders = 2, but orders has shape \(1, 2\)",
        ),
    ],
)
def test_parallel_refuses_orders(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParallelMambaMixer(8, **arguments)


def test_parallel_refuses_sequences_of_another_length():
    with pytest.raises(ValueError, match=r"orders have shape \(2, 5\), expected \(k,L\) = \(2, 6\)"):
        ParallelMambaMixer(8, orders(2, 5))(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="no orders"):
        ParallelMambaMixer(8, num_orders=2)(torch.randn(1, 6, 8))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_backend_argument_reaches_both_operations(backend):
    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "zigflow":
                seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        MambaMixer(8, backend=backend)(torch.randn(1, 4, 8))
    assert seen == ({"zigflow::shifted_conv", "zigflow::chunked_scan"} if backend == "torch" else set())
    with pytest.raises(ValueError, match="unknown backend 'tourch'"):
        MambaMixer(8, backend="tourch")(torch.randn(1, 4, 8))


@pytest.mark.parametrize("kind", [MambaMixer, BiMambaMixer])
def test_autocast_keeps_the_state_space_in_float32(kind):
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.name() in ("zigflow::cpu_scan", "zigflow::chunked_scan"):
                calls.append([None if t is None else t.dtype for t in args[:8]] + [t.dtype for t in out])
            return out

    mixer, tokens = kind(32), torch.randn(2, 40, 32)
    with Record(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(tokens)
    half, full = torch.bfloat16, torch.float32
    z = half if kind is MambaMixer else None
    assert calls == [[half, half, full, half, half, full, z, full, half, full]] * len(calls) != []
    assert out.dtype == half
    assert_relative_rms("output", out, mixer(tokens), 2e-2)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == full for p in mixer.parameters())


def test_a_module_cast_to_half_still_scans_in_float32():
    mixer, tokens = MambaMixer(32), torch.randn(2, 40, 32)
    want = mixer(tokens)
    assert_relative_rms("output", mixer.bfloat16()(tokens.bfloat16()), want, 2e-2)
