"""The configuration as frozen, typed values, checked before any device is touched.

``Settings.from_mapping`` reads plain dicts (no omegaconf here). Each message names the key as it is typed
on the command line, what was given and what is allowed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scans import parse_scan_type
from zigflow.paths import with_expanded_paths
from zigflow.settings_sampling import DiffusionSettings, OdeSettings, SdeSettings, UpsampleSettings
from zigflow.typed import SettingsError, at_least, not_negative, one_of, parse, positive

PATH_TYPES = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "score", "noise", "data")
WANDB_KEY = (
    "a key of wandb (wandb.key) does not belong in a configuration, which logs and checkpoints repeat: remove it (and "
    "revoke the key if it was shared), then run wandb login, or export WANDB_API_KEY"
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Group ``train``: the flow process, keys of the official layout."""

    path_type: str = "Linear"
    prediction: str = "velocity"
    loss_weight: str | None = None
    sample_eps: float | None = None
    train_eps: float | None = None

    def __post_init__(self):
        one_of("train.path_type", self.path_type, PATH_TYPES)
        one_of("train.prediction", self.prediction, PREDICTIONS)
        one_of("train.loss_weight", self.loss_weight, (None, "velocity", "likelihood"))


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Group ``optim``; ``args`` are the optimizer's own settings, ``_target_`` a class in place of a name."""

    name: str = "adamw"
    _target_: str | None = None
    lr: float = 1e-4
    wd: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr: float = 0.0
    exclude_tagged_from_decay: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        positive("optim.lr", self.lr)
        positive("optim.eps", self.eps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"optim.betas={list(self.betas)} are not in [0, 1)")
        not_negative("optim.wd", self.wd)
        not_negative("optim.warmup_steps", self.warmup_steps)
        one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        if not 0 <= self.min_lr <= self.lr:
            raise SettingsError(f"optim.min_lr={self.min_lr} is not in [0, optim.lr={self.lr}]")
        if self.min_lr and self.schedule != "cosine":
            raise SettingsError(
                f"optim.min_lr={self.min_lr} ends a cosine: set optim.schedule=cosine, or drop it"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Group ``data``; ``batch_size`` is per process, ``train_steps`` counts optimizer steps.

    ``image_size`` (of both sides, or height and width), ``channels``, ``num_classes`` (0 or less: without classes) and
    ``class_names`` may be None until the data has been read, from which they then follow.
    """

    name: str
    train_steps: int
    batch_size: int
    image_size: int | tuple[int, int] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    channels: int | None = 3
    video_frames: int = 0
    num_workers: int = 0
    sample_fid_n: int = 5_000
    sample_fid_every: int = 0
    sample_fid_bs: int = 128
    sample_vis_n: int = 16
    is_video: bool | None = None
    is_latent: bool = False
    has_text: bool = False
    d_context: int = 0
    n_context_token: int = 0
    tar_base: str | None = None
    prepare: str = ""
    limit: int | None = None
    order: str = "indexed"
    shards_at_once: int | None = None
    max_skipped: int = 0
    random_flip: bool = False
    source: Mapping[str, Any] | None = None
    heldout: Mapping[str, Any] | None = None

    def __post_init__(self):
        for key in ("train_steps", "batch_size", "sample_fid_n", "sample_fid_bs"):
            at_least(f"data.{key}", getattr(self, key), 1)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        for key, value in (*(("image_size", side) for side in sides), ("channels", self.channels)):
            if value is not None:
                at_least(f"data.{key}", value, 1)
        if self.class_names is not None:
            _check_class_names(self.class_names, self.num_classes)
        for key in ("num_workers", "video_frames", "sample_fid_every", "sample_vis_n", "max_skipped"):
            not_negative(f"data.{key}", getattr(self, key))
        one_of("data.order", self.order, ("indexed", "streaming"))
        if self.shards_at_once is not None:
            at_least("data.shards_at_once", self.shards_at_once, 1)
            if self.order == "streaming":
                raise SettingsError(
                    f"data.shards_at_once={self.shards_at_once} is of data.order=indexed; a stream mixes in "
                    "data.source.stream.shuffle_buffer: drop data.shards_at_once"
                )
        if self.limit is not None:
            at_least("data.limit", self.limit, 1)
            if self.order == "streaming":
                raise SettingsError(
                    f"data.limit={self.limit} needs samples with numbers, a stream has none: use data.order=indexed"
                )
        if self.random_flip and self.is_latent:
            raise SettingsError(
                f"data.random_flip=true mirrors pixels, and data={self.name} holds latents: store those of the "
                "mirrored images beside the others, and set data.random_flip=false"
            )
        if self.is_video is not None and self.is_video != (self.video_frames > 0):
            raise SettingsError(
                f"data.is_video={self.is_video} contradicts data.video_frames={self.video_frames}: drop data.is_video"
            )
        if self.source is not None and not isinstance(self.source.get("_target_"), str):
            raise SettingsError(f"data.source of data={self.name} names no class: give data.source._target_")


def _check_class_names(names: tuple[str, ...], num_classes: int | None) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SettingsError(f"data.class_names has {twice[0]} more than once: give each class its own name")
    if names and num_classes is not None and 0 < num_classes != len(names):
        raise SettingsError(
            f"data.class_names has {len(names)} names, data.num_classes={num_classes}: give as many, or drop a key"
        )


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Group ``loop``: what the official layout has no key for."""

    keep_last: int = 3
    progress: bool = True
    compile: bool = False
    checkpoint_policy: str = "none"
    shard: bool = False
    ema_half_life: tuple[int, ...] = ()
    ema_ramp: float = 0.05
    threads: int | None = None
    device: str | None = None
    tensorboard: bool = False
    peak_flops: float | None = None
    objective: str | None = None

    def __post_init__(self):
        if self.peak_flops is not None:
            positive("loop.peak_flops", self.peak_flops)
        at_least("loop.keep_last", self.keep_last, 1)
        not_negative("loop.ema_ramp", self.ema_ramp)
        one_of("loop.checkpoint_policy", self.checkpoint_policy, ("none", "block", "selective"))
        for half_life in self.ema_half_life:
            at_least("loop.ema_half_life", half_life, 1)
        one_of("loop.device", self.device, (None, "cpu"))
        if self.threads is not None:
            at_least("loop.threads", self.threads, 1)


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Group ``wandb``. It has no key: one that stands here would be copied into logs and checkpoints."""

    entity: str | None = None
    project: str = "zigflow"
    mode: str | None = None
    name: str | None = None

    def __post_init__(self):
        one_of("wandb.mode", self.mode, (None, "online", "offline", "disabled"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration of a training run."""

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    ode: OdeSettings
    sde: SdeSettings
    loop: LoopSettings
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    upsample: UpsampleSettings = field(default_factory=UpsampleSettings)
    model: Mapping[str, Any]
    scan: Mapping[str, Any]
    process: Mapping[str, Any]
    codec: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    wandb: WandbSettings = field(default_factory=WandbSettings)
    dist: Mapping[str, Any] | None = None
    ckpt: str | None = None
    ckpt_patches: str = "spread"
    ckpt_every: int = 50_000
    log_every: int = 100
    max_grad_norm: float | None = 2.0
    ema_rate: float | None = 0.9999
    global_seed: int = 0
    grad_accum: int = 1
    is_latent: bool = False
    use_latent: bool = False
    use_wandb: bool = False
    note: str = ""
    sample_mode: str | None = None
    likelihood: bool = False
    num_fid_samples: int = 4_000
    sample_debug: bool = False
    sample_dir: str | None = None
    vae: str = "ema"
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    mixed_precision: str | None = None
    run_dir: str
    resume: str = "auto"

    def __post_init__(self):
        for key in ("ckpt_every", "log_every", "grad_accum", "num_fid_samples"):
            at_least(key, getattr(self, key), 1)
        if self.max_grad_norm is not None:
            positive("max_grad_norm", self.max_grad_norm)
        if self.ema_rate is not None and not 0 <= self.ema_rate < 1:
            raise SettingsError(
                f"ema_rate={self.ema_rate} is not in [0, 1): give a decay such as 0.9999, or null"
            )
        not_negative("global_seed", self.global_seed)
        if self.global_seed >= 2**63:
            raise SettingsError(f"global_seed={self.global_seed} must be less than 2^63")
        for key in ("run_dir", "sample_dir"):
            if getattr(self, key) == "":
                raise SettingsError(f"{key} is empty: give {key}=FOLDER, or drop it")
        one_of("sample_mode", self.sample_mode, (None, "ODE", "SDE", "diffusion"))
        one_of("mixed_precision", self.mixed_precision, (None, "no", "fp16", "bf16"))
        one_of("resume", self.resume, ("auto", "never"))
        one_of("ckpt_patches", self.ckpt_patches, ("spread", "as_published"))
        one_of("vae", self.vae, ("ema", "mse"))
        low, high = self.cfg_interval
        if not 0 <= low < high <= 1:
            raise SettingsError(f"cfg_interval={list(self.cfg_interval)} is not 0 <= low < high <= 1")
        self._check_combinations()

    @property
    def asks_likelihood(self) -> bool:
        """Whether a command measures the likelihood of data, however that is spelt."""
        return self.likelihood or self.ode.likelihood

    @property
    def measures_data(self) -> bool:
        """Whether a command works on given data, their likelihood or their noise, instead of sampling."""
        return self.asks_likelihood or self.ode.reverse

    def _check_combinations(self) -> None:
        model = self.model
        for group in ("model", "process", "codec"):
            if not isinstance(getattr(self, group).get("_target_"), str):
                raise SettingsError(f"{group} names no class: choose {group}=NAME, or give {group}._target_")
        if self.cfg_scale != 1 and not model.get("class_dropout_prob", 0):
            raise SettingsError(
                f"cfg_scale={self.cfg_scale} needs a model with a null class: model.class_dropout_prob is "
                f"{model.get('class_dropout_prob', 0)}; train with model.class_dropout_prob=0.1, or set cfg_scale=1"
            )
        likelihood = self.asks_likelihood
        inverts = (
            self.sample_mode == "diffusion"
            and self.diffusion.sampling_method == "ddim"
            and not self.diffusion.eta
        )
        bounds = self.sample_mode == "diffusion" and self.diffusion.sampling_method == "ddpm"
        asks = (likelihood and not bounds) or (self.ode.reverse and not inverts)
        if asks and self.sample_mode in ("SDE", "diffusion"):
            raise SettingsError(
                f"likelihood=true and ode.reverse=true need the ODE: set sample_mode=ODE, not {self.sample_mode}; "
                "with sample_mode=diffusion, diffusion.sampling_method=ddpm has the variational bound of "
                "process=gaussian, and ddim with diffusion.eta=0 can be reversed"
            )
        self._check_process()
        self.upsample.check(self.process, measures=self.measures_data)
        if likelihood and self.ode.reverse:
            raise SettingsError("likelihood=true and ode.reverse=true exclude each other: choose one")
        if self.measures_data and self.cfg_scale != 1:
            raise SettingsError(
                f"cfg_scale={self.cfg_scale} with likelihood=true or ode.reverse=true: guidance has no density of its "
                "own, set cfg_scale=1"
            )
        if "scan_type" in model:
            try:
                parse_scan_type(model["scan_type"])
            except (ValueError, TypeError, KeyError) as error:
                raise SettingsError(f"model.scan_type={model['scan_type']}: {error}") from error
        if self.optim.schedule == "cosine" and self.optim.warmup_steps >= self.data.train_steps:
            raise SettingsError(
                f"optim.warmup_steps={self.optim.warmup_steps} leaves nothing of data.train_steps="
                f"{self.data.train_steps} for optim.schedule=cosine: lower optim.warmup_steps"
            )
        if self.use_latent and not self.is_latent and is_identity(self.codec):
            raise SettingsError(
                f"use_latent=true, but data={self.data.name} holds pixels and codec=pixels does not encode them: give "
                "codec=sd_vae codec.path=FOLDER, or set use_latent=false"
            )
        frames = model.get("video_frames", 0) or 0
        if frames != self.data.video_frames:
            raise SettingsError(
                f"model.video_frames={frames} and data.video_frames={self.data.video_frames} differ: make them equal"
            )

    def _check_process(self) -> None:
        target = str(self.process.get("_target_", ""))
        if self.sample_mode == "diffusion" and target.endswith(".Flow"):
            raise SettingsError(
                "sample_mode=diffusion has no steps for process=flow: set sample_mode=ODE or SDE, or train with "
                "process=gaussian, vp or sd_discrete"
            )
        if self.sample_mode == "diffusion" and self.asks_likelihood and not target.endswith(".Gaussian"):
            raise SettingsError(
                "likelihood=true with sample_mode=diffusion is the variational bound of process=gaussian, which "
                f"{target.rpartition('.')[2]} has none of: set sample_mode=ODE"
            )
        spaced = (
            self.diffusion.sampling_method in ("ddpm", "ddim") and not self.diffusion.num_steps.isdecimal()
        )
        if self.sample_mode == "diffusion" and spaced and target.endswith(".VariancePreserving"):
            raise SettingsError(
                f"diffusion.num_steps={self.diffusion.num_steps}: process=vp is continuous and has no steps to space, "
                "give a number"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Check and freeze a plain configuration.

        Raises:
            SettingsError: an unknown key, a wrong type or an impossible combination, in one line.
        """
        if "key" in (values.get("wandb") or {}):
            # Not as an unknown key: its value must appear nowhere.
            raise SettingsError(WANDB_KEY)
        return parse(cls, with_expanded_paths(values), "")


def is_identity(codec: Mapping[str, Any]) -> bool:
    """Whether a codec's node leaves values as they are, up to a scale."""
    return str(codec.get("_target_", "")).endswith(".IdentityCodec")
