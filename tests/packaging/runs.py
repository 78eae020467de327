"""Three runs that together use each thing of the package ``one_of_each``."""

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "one_of_each"

_SHORT = [
    "data=each_stripes", "codec=each_negative", "optim.name=each_sign", "optim.args.momentum=0.5",
    "loop.trackers=[each_lines]", "log_every=1", "loop.progress=false", "loop.device=cpu",
]  # fmt: skip
_ZIGMA = ["model=digits_zigzag8", "model.embed_dim=8", "model.depth=2", "model.patch_size=1"]


@dataclass(frozen=True)
class Run:
    """What is typed to train and to sample, and ``log``: what the training says."""

    train: tuple[str, ...]
    sample: tuple[str, ...]
    log: str = ""


RUNS = {
    "a scan, a kernel backend, an interpolant and an ODE method": Run(
        (*_SHORT, *_ZIGMA, "scan=each_columns", "model.ssm_cfg.backend=each_loop", "train.path_type=EachQuadratic"),
        ("ode.sampling_method=each_ralston", "ode.num_steps=3"),
        "selective_scan runs on backend 'each_loop'",
    ),
    "a mixer and an SDE method": Run(
        (*_SHORT, *_ZIGMA, "model.mixer=each_average", "model.ssm_cfg=null"),
        ("sample_mode=SDE", "sde.sampling_method=each_late_noise", "sde.num_steps=4"),
    ),
    "a model and a diffusion sampler": Run(
        (*_SHORT, "model=each_pixelwise", "process=gaussian"),
        ("sample_mode=diffusion", "diffusion.sampling_method=each_ddim", "diffusion.num_steps=5"),
    ),
}  # fmt: skip
SAMPLED = ("num_fid_samples=4", "metrics=each_brightness", "loop.progress=false", "loop.device=cpu")
