"""Everything that a training run is at one moment, to and from the files of a checkpoint."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zigflow import __version__
from zigflow.nn import as_denoiser

from .checkpoint import FORMAT_VERSION, Checkpoint, CheckpointError, check_names
from .ema import EmaProfiles
from .optim import load_optimizer_state, optimizer_state
from .precision import LossScaler
from .run_dir import flat
from .scan_order import check_scan, scan_facts
from .tensors import assign, clean_name, full

__all__ = ["Counters", "RunRecord", "RunState", "load_weights", "model_state", "versions", "weight_files"]

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        images_seen: images of those steps.
        skipped: steps that fp16 overflow skipped; they consumed data and nothing else.
        loss_sum, loss_steps: of the steps since the last logged line.
        time_sums, time_counts: of the samples since the last logged line, by time bin.
        best: the best evaluation so far, ``{"metric", "value", "step"}``.
        evaluated: the last step that was evaluated.
        ema_images: images that were behind the averages when the run began, of the run whose weights it started from.
        keep: steps whose checkpoints stay.
        tracking: by tracker, what it has to know to continue.
        unreadable: digests of the unreadable samples that were replaced, as of the last step that told them.
    """

    step: int = 0
    images_seen: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    time_sums: list[float] = field(default_factory=list)
    time_counts: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    evaluated: int = 0
    ema_images: int = 0
    keep: list[int] = field(default_factory=list)
    tracking: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """Global batches consumed: where the data continues."""
        return self.step + self.skipped


@dataclass(frozen=True)
class RunRecord:
    """What the checkpoints of a run say of it beside its state.

    Attributes:
        config: the resolved configuration, plain and JSON-able; compared with the stored one on resume.
        plugins: names of the plug-ins in use.
        facts: JSON values that are compared with nothing.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """The live objects of a run.

    Args:
        model: the unwrapped model.
        data: what fixes the meaning of a position in the data: seed, global batch, samples in an epoch, and under
            ``identity`` whatever plain facts tell one data set and order from another, or None.
        facts: what is only recorded: run id, plug-ins, precision, world size.
    """

    model: nn.Module
    optimizer: Optimizer
    ema: EmaProfiles
    scaler: LossScaler
    counters: Counters
    data: Mapping[str, Any]
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    device: torch.device

    def shared_files(self) -> dict[str, Any]:
        """File name -> contents of what all ranks share; collective when parameters are sharded."""
        tensors, groups = optimizer_state(self.model, self.optimizer)
        seen = self.counters.batches * (self.data["global_batch"] or 0)
        size = self.data.get("epoch_size")
        facts = {
            "data": {**self.data, "g": seen, "epoch": seen // size if size else None},
            "optimizer_groups": groups,
            "scaler": self.scaler.state_dict(),
            "ema": [asdict(profile) for profile in self.ema.profiles],
            **self.facts,
        }
        files = weight_files(self.model, self.config, self.counters, facts)
        files["optimizer.safetensors"] = tensors
        for name in self.ema.names():
            files[f"ema_{name}.safetensors"] = self.ema.state_dict(name)
        return files

    def own_files(self, rank: int) -> dict[str, Any]:
        """The files of this process."""
        return {
            f"rank_{rank:04d}.safetensors": random_state(self.device),
            f"rank_{rank:04d}.json": {"device": self.device.type, "threads": torch.get_num_threads()},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; the torch generators are restored apart, just before the first step.

        Raises:
            CheckpointError: the data position has another meaning here, the scan orders differ, or names or shapes of
                weights, averages or optimizer state do not fit.
        """
        stored = checkpoint.trainer
        check_data_identity(checkpoint, self.data.get("identity"))
        for key, value in self.data.items():
            before = stored["data"].get(key)
            if key != "identity" and before != value:
                raise CheckpointError(
                    f"{checkpoint.path} was written with {key}={before}, this run has {key}={value}: "
                    f"its samples would come in another order; use {key}={before}, or start a new run_dir"
                )
        check_scan_state(self.model, checkpoint)
        load_model_state(self.model, checkpoint.tensors("model"), f"the model of {checkpoint.path}")
        for name in self.ema.names():
            if name not in checkpoint.ema_names:
                known = ", ".join(checkpoint.ema_names) or "none"
                raise CheckpointError(
                    f"{checkpoint.path} has no EMA profile {name!r} (it has {known}); "
                    "profiles are chosen when a run starts"
                )
            self.ema.load_state_dict(name, checkpoint.tensors(f"ema_{name}"))
        load_optimizer_state(
            self.model, self.optimizer, checkpoint.tensors("optimizer"), stored["optimizer_groups"]
        )
        self.scaler.load_state_dict(stored["scaler"])
        for key, value in stored["counters"].items():
            setattr(self.counters, key, value)


def weight_files(
    model: nn.Module, config: Mapping[str, Any], counters: Counters, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """File name -> contents of what every checkpoint has, also one that no run has written.

    Args:
        facts: what else ``trainer.json`` says; what it leaves out is empty there.
    """
    scan = scan_facts(model)
    files: dict[str, Any] = {
        "model.safetensors": model_state(model),
        "config.json": dict(config),
        "trainer.json": {
            "format_version": FORMAT_VERSION,
            **({} if scan is None else {"scan": scan}),
            "counters": asdict(counters),
            "data": {},
            "ema": [],
            "plugins": [],
            "versions": versions(),
            **facts,
        },
    }
    paths = scan_state(model)
    if paths:
        files["paths.safetensors"] = paths
    return files


def check_data_identity(checkpoint: Checkpoint, now: Mapping[str, Any] | None) -> None:
    """Compare the stored identity of the data with this run's; checkpoints without one are accepted.

    Raises:
        CheckpointError: they differ; the differing facts are named with both values.
    """
    before = checkpoint.trainer["data"].get("identity")
    if before is None:
        return
    before, now = dict(before), dict(now or {})
    former, times, were = now.pop("former", None), now.pop("times", None), before.pop("times", None)
    if former is not None and "former" not in before and before.get("fingerprint") == former:
        log.info(
            "%s was written when data was told apart by names and sizes alone: those are compared",
            checkpoint.path,
        )
        before["fingerprint"] = now["fingerprint"]
    before.pop("former", None)
    old, new = flat(before), flat(now)
    different = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if different:
        changes = (
            f"{key} was {old.get(key, '(absent)')!r}, is {new.get(key, '(absent)')!r}" for key in different
        )
        raise CheckpointError(
            f"{checkpoint.path} was trained on other data or in another order: {'; '.join(changes)}; resume with the "
            "data as it was (its folder may move), or start a new run_dir"
        )
    if times and were and times != were:
        log.warning(
            "the training data was written or copied since %s: %s of %s were compared by contents and are equal, so "
            "the run goes on",
            checkpoint.path, times["hashed"], times["files"],
        )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a run."""
    import accelerate
    import numpy
    import safetensors

    return {
        "zigflow": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "accelerate": accelerate.__version__,
        "safetensors": safetensors.__version__,
    }


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as plain CPU tensors under clean names."""
    return {clean_name(name): full(value) for name, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], what: str = "the stored model") -> None:
    """Copy a stored state dict into the model.

    Args:
        what: names the state in an error.

    Raises:
        CheckpointError: names or shapes differ; the first one is named with both shapes.
    """
    targets = {clean_name(name): value for name, value in model.state_dict().items()}
    check_names(what, state, targets)
    for name, target in targets.items():
        assign(target, state[name])


def scan_state(model: nn.Module) -> dict[str, Tensor]:
    """The orders of the model's random scans, by name."""
    return {name: full(value) for name, value in as_denoiser(model).scan_state().items()}


def check_scan_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare the model's scan orders with the stored ones: weights trained along one order fit no other.

    Raises:
        CheckpointError: they differ; the first differing one is named.
    """
    have = scan_state(model)
    stored = checkpoint.tensors("paths") if checkpoint.has("paths.safetensors") else {}
    for name in sorted(set(have) | set(stored)):
        if name not in have or name not in stored or not torch.equal(have[name], stored[name]):
            raise CheckpointError(
                f"scan order {name!r} of the model differs from the one that {checkpoint.path} was trained with; "
                "use the same scan, its seed and the same resolution"
            )
    check_scan(model, checkpoint)


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: str | None = None) -> str:
    """Load a checkpoint into a model that is to be sampled or evaluated.

    Args:
        weights: ``model`` for the weights themselves, an EMA profile's name, or None for the first profile
            that the run listed (the weights themselves when it had none).

    Returns:
        What was loaded, ``"model"`` or ``"ema_<profile>"``.

    Raises:
        CheckpointError: there is no such profile, the scan orders differ, or the stored weights do not fit the model.
    """
    listed = [profile["name"] for profile in checkpoint.trainer["ema"]]
    chosen = weights if weights is not None else (listed[0] if listed else "model")
    if chosen != "model" and chosen not in listed:
        raise CheckpointError(
            f"{checkpoint.path} has no weights {chosen!r}; known: {', '.join(['model', *listed])}"
        )
    check_scan_state(model, checkpoint)
    load_model_state(model, checkpoint.tensors("model"), f"the model of {checkpoint.path}")
    if chosen == "model":
        return chosen
    averages = checkpoint.tensors(f"ema_{chosen}")
    targets = {clean_name(n): p for n, p in model.named_parameters() if p.dtype.is_floating_point}
    check_names(f"EMA profile {chosen!r} of {checkpoint.path}", averages, targets)
    for name, target in targets.items():
        assign(target, averages[name])
    return f"ema_{chosen}"


def inference_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's state as it is sampled by default: with the parameters of the first EMA profile, if there is one."""
    listed = [profile["name"] for profile in checkpoint.trainer["ema"]]
    return checkpoint.tensors("model") | (checkpoint.tensors(f"ema_{listed[0]}") if listed else {})


def all_averages(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The averages of every EMA profile, by its name."""
    names = [profile["name"] for profile in checkpoint.trainer["ema"]]
    return {name: checkpoint.tensors(f"ema_{name}") for name in names}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's generator states that this process uses, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
