"""Stages of gpu.py on whole models: steps, images per second of published sizes, and the same run twice."""

import gc
import statistics
from argparse import Namespace

import torch
import torch.nn.functional as F
from cases import LIMITS, SIZES, Case, Setting, build, relative, turn, weights_of
from gpu_kernels import digest, plain
from models import backends, row
from peak_memory import peak_bytes
from peers import PEERS
from step_profile import profiled

from zigflow.engine.optim import build_optimizer
from zigflow.engine.peak import peak_flops
from zigflow.models import build_variant
from zigflow.nn.flops import TRAINING_FACTOR, count_flops

WARMUP, STEPS = 2, 5


def settings() -> dict[str, Setting]:
    """Those of ``models.py`` by name."""
    return {setting.name: setting for each in SIZES.values() for setting in each}


def options_of(device: str, precision: str, compiler: str) -> Namespace:
    return Namespace(
        device=torch.device(device),
        precision=precision,
        backend="auto",
        compile_options={"backend": compiler},
    )


def step(
    setting: str,
    arrangement: str,
    mode: str,
    precision: str,
    repeats: int,
    profile: bool,
    compiler: str,
    device: str,
) -> dict:
    """Training and inference steps of a setting of ``models.py``; compiled ones are first compared with eager ones."""
    chosen, options = settings()[setting], options_of(device, precision, compiler)
    state = weights_of(chosen, options)
    case = Case(chosen, arrangement, mode, "none", state, options)
    if mode == "compiled":
        eager = Case(chosen, arrangement, "eager", "none", state, options)
        if arrangement in PEERS:
            _fill_zeros(eager.model)
            case.model.load_state_dict(eager.model.state_dict())
        difference = _difference(case, eager)
        del eager
        gc.collect()
        limits = dict(zip(("output", "gradient"), LIMITS[precision], strict=True))
        off = [
            f"compiled against eager: the {name} differs by {value} of its size, {limits[name]:.0e} allowed"
            for name, value in difference.items()
            if value is None or value > limits[name]
        ]
        if off:
            return {"wrong": off, "compiled_from_eager": difference}
    for kind in case.seconds:
        turn(case, kind, WARMUP)
        case.memory[kind] = peak_bytes(case.device, getattr(case, kind))
    for _ in range(repeats):
        for kind, seconds in case.seconds.items():
            seconds.append(turn(case, kind, STEPS if case.device.type == "cuda" else 1))
    forward = chosen.batch * count_flops(build(chosen, arrangement, "auto", torch.device("meta"))).forward
    found = {
        **row(case, forward, peak_flops(case.device, precision)),
        "batch": chosen.batch,
        "tokens": chosen.tokens,
        "backends": backends(options),
    }
    if mode == "compiled":
        found["compiled_from_eager"] = difference
    if profile:
        seconds = statistics.median(case.seconds["train"])
        found["profile"] = profiled(case.train, case.model, case.device, 3, seconds)
    return found


def _fill_zeros(model: torch.nn.Module) -> None:
    """What training starts at zero is drawn, or no block would do anything and no gradient would say so."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if not value.any():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def _difference(case: Case, eager: Case) -> dict[str, float | None]:
    """Of the output and of all gradients, relative to their size; None for what is no number."""
    outs, grads = [], []
    for each in (case, eager):
        outs.append(each.backward())
        grads.append(
            torch.cat([p.grad.flatten().float() for p in each.model.parameters() if p.grad is not None])
        )
        each.optimizer.zero_grad(set_to_none=True)
    return {"output": plain(relative(*outs)), "gradient": plain(relative(*grads))}


def images_per_second(
    variant: str, pixels: int, batch: int, kind: str, mode: str, precision: str, repeats: int, changes: dict,
    compiler: str, device: str,
) -> dict:  # fmt: skip
    """Images per second of a named model on latents of images of ``pixels``, forward or a training step with AdamW."""
    where = torch.device(device)
    side = changes.get("img_dim", pixels // 8)
    model = build_variant(variant, **{"img_dim": side, **changes}, device=where)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.in_channels, side, side, generator=generator).to(where)
    t = torch.rand(batch, generator=generator).to(where)
    y = torch.randint(1000, (batch,), generator=generator).to(where) if model.num_classes > 0 else None
    optimizer = build_optimizer("adamw", model, lr=1e-5, weight_decay=0.0) if kind == "train" else None
    if mode == "compiled":
        model.compile_blocks(backend=compiler)
    model.train(kind == "train")

    def run():
        with torch.set_grad_enabled(kind == "train"):
            with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
                out = model(x, t, y)
            if optimizer is not None:
                F.mse_loss(out.float(), torch.zeros_like(out, dtype=torch.float32)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return out

    case = Namespace(device=where, run=run)
    if not run().isfinite().all():
        return {"wrong": ["the output is not finite"]}
    turn(case, "run", WARMUP)
    seconds = [turn(case, "run", STEPS if where.type == "cuda" else 1) for _ in range(repeats)]
    median = statistics.median(seconds)
    memory = peak_bytes(where, run)
    forward = count_flops(build_variant(variant, **{"img_dim": side, **changes}, device="meta")).forward
    peak = peak_flops(where, precision)
    work = forward * batch * (TRAINING_FACTOR if kind == "train" else 1)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": round(batch / median, 2),
        "step_ms": round(1e3 * median, 3),
        "range_ms": [round(1e3 * value, 3) for value in (min(seconds), max(seconds))],
        "forward_gflop_per_image": round(forward / 1e9, 3),
        "mfu": None if peak is None else round(work / median / peak, 4),
        "peak_mib_above_state": round(memory / 2**20, 1),
        "float32_products": torch.get_float32_matmul_precision(),
    }


def bits_of_steps(
    setting: str, arrangement: str, mode: str, precision: str, compiler: str, device: str
) -> dict:
    """Digests of three training steps, to be compared with those of another process."""
    chosen, options = settings()[setting], options_of(device, precision, compiler)
    case = Case(chosen, arrangement, mode, "none", weights_of(chosen, options), options)
    if arrangement in PEERS:
        _fill_zeros(case.model)
    found = {}
    out = case.backward()
    found["output"] = digest([out])
    found["gradients of the first step"] = digest(
        p.grad for p in case.model.parameters() if p.grad is not None
    )
    case.optimizer.zero_grad(set_to_none=True)
    for _ in range(3):
        case.train()
    found["weights after three steps"] = digest(case.model.parameters())
    return found
