"""The configuration as frozen, typed values, checked before any device is touched.

``Settings.from_mapping`` reads plain dicts (no omegaconf here). Each message names the key as it is typed
on the command line, what was given and what is allowed. Types, ranges and combinations are checked here; names that
packages add to (samplers, predictions, optimizers, ...) are checked in ``zigflow.names``.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scans import parse_scan_type
from zigflow.paths import with_expanded_paths
from zigflow.settings_sampling import DiffusionSettings, OdeSettings, SdeSettings, UpsampleSettings
from zigflow.typed import REQUIRED, SettingsError, key, parse

WANDB_KEY = (
    "a key of wandb (wandb.key) does not belong in a configuration, which logs and checkpoints repeat: remove it (and "
    "revoke the key if it was shared), then run wandb login, or export WANDB_API_KEY"
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Group ``train``: the flow process, keys of the official layout."""

    path_type: str = key(
        "Linear", "path of a flow between noise and data: Linear | GVP | VP | another registered one"
    )
    prediction: str = key(
        "velocity",
        "what the network predicts under a flow: velocity | score | noise | data | another registered one",
    )
    loss_weight: str | None = key(
        None,
        "weight of a flow's loss over time: null (none) | velocity | likelihood",
        used="training",
    )
    sample_eps: float | None = key(
        None,
        "sampling of a flow keeps this distance from the ends of time; null: what path and prediction need",
        used="sampling",
    )
    train_eps: float | None = key(
        None,
        "training of a flow keeps this distance from the ends of time; null: what path and prediction need",
        used="training",
    )


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Group ``optim``; ``args`` are the optimizer's own settings, ``_target_`` a class in place of a name."""

    name: str = key("adamw", "registered optimizer: adamw, muon, or any of torch.optim in lower case")
    _target_: str | None = key(
        None, "class of an optimizer by its dotted path, in place of a registered name"
    )
    lr: float = key(1e-4, "learning rate after the warm-up", above=0)
    wd: float = key(0.0, "weight decay", least=0)
    betas: tuple[float, float] = key((0.9, 0.999), "decay of Adam's two running means, each in [0, 1)")
    eps: float = key(1e-8, "Adam's epsilon", above=0)
    schedule: str = key(
        "constant", "learning rate after the warm-up: constant | cosine", choices=("constant", "cosine")
    )
    warmup_steps: int = key(0, "optimizer steps in which the learning rate rises linearly", least=0)
    min_lr: float = key(0.0, "where the cosine ends, at data.train_steps")
    exclude_tagged_from_decay: bool = key(
        False, "keep A_log and D of state-space layers out of weight decay (the published runs do not)"
    )
    args: Mapping[str, Any] = key(dict, "the optimizer's own arguments: optim.args.momentum=0.9")

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"optim.betas={list(self.betas)} are not in [0, 1)")
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

    name: str = key(REQUIRED, "label of the data set, for logs and errors")
    train_steps: int = key(REQUIRED, "optimizer steps of the whole run", least=1, used="training")
    batch_size: int = key(REQUIRED, "samples per process and micro-batch", least=1, used="training")
    image_size: int | tuple[int, int] | None = key(
        None, "height and width in pixels, one number or [height, width]; null: as stored", least=1
    )
    num_classes: int | None = key(None, "0 or less: train without classes; null: as the data says")
    class_names: tuple[str, ...] | None = key(
        None, "names in the order of the class numbers; null: as the data lists them"
    )
    channels: int | None = key(3, "1 | 3 for pixels; null: those of the first image", least=1)
    video_frames: int = key(0, "frames of a video; 0: images", least=0)
    num_workers: int = key(
        0,
        "processes that read data, for each training process; 0: read in the process itself",
        least=0,
        used="training",
    )
    sample_fid_n: int = key(5_000, "samples of an evaluation during training", least=1, used="training")
    sample_fid_every: int = key(
        0, "optimizer steps between evaluations, which use the EMA weights; 0: none", least=0, used="training"
    )
    sample_fid_bs: int = key(
        128, "samples per batch of an evaluation during training", least=1, used="training"
    )
    sample_vis_n: int = key(
        16, "samples of an evaluation that are shown as a picture", least=0, used="training"
    )
    is_video: bool | None = key(None, "checked against data.video_frames; null: follows from it")
    is_latent: bool = key(False, "the data holds latents instead of pixels")
    has_text: bool = key(False, "the data holds caption features")
    d_context: int = key(0, "width of a caption token; 0 without captions")
    n_context_token: int = key(0, "tokens of a caption; 0 without captions")
    tar_base: str | None = key(
        None, "folder of the training tars, from which data.source.root follows in published data sets"
    )
    prepare: str = key("", "how to make this data set, repeated by the error when it is missing")
    limit: int | None = key(None, "train on the first samples only; null: on all", least=1, used="training")
    order: str = key(
        "indexed",
        "indexed: a function of the seed, resumed exactly | streaming: for URLs, resumed approximately",
        choices=("indexed", "streaming"),
    )
    shards_at_once: int | None = key(
        None, "shards whose samples mix; null: all, up to 4,194,304 samples", least=1, used="training"
    )
    max_skipped: int = key(
        0, "unreadable samples that may be replaced; 0: each is an error", least=0, used="training"
    )
    random_flip: bool = key(
        False, "mirror images left to right with probability 1/2 in training", used="training"
    )
    source: Mapping[str, Any] | None = key(None, "training data: a class by _target_ with its arguments")
    heldout: Mapping[str, Any] | None = key(None, "held-out data: a class by _target_ with its arguments")

    def __post_init__(self):
        if self.class_names is not None:
            _check_class_names(self.class_names, self.num_classes)
        if self.shards_at_once is not None and self.order == "streaming":
            raise SettingsError(
                f"data.shards_at_once={self.shards_at_once} is of data.order=indexed; a stream mixes in "
                "data.source.stream.shuffle_buffer: drop data.shards_at_once"
            )
        if self.limit is not None and self.order == "streaming":
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

    keep_last: int = key(3, "checkpoints that are kept", least=1, used="training")
    progress: bool = key(True, "a bar on a terminal, elsewhere a line of the log now and then")
    compile: bool = key(
        False, "compile the model's blocks; false unless accelerate was told", used="training"
    )
    checkpoint_policy: str = key(
        "none",
        "what is kept for the backward pass: none (everything) | block | selective",
        choices=("none", "block", "selective"),
        used="training",
    )
    shard: bool = key(
        False, "several processes keep a part of every parameter each, instead of a copy", used="training"
    )
    ema_half_life: tuple[int, ...] = key(
        (500_000,), "EMA profiles, half-life in images; unused with ema_rate", least=1, used="training"
    )
    ema_ramp: float = key(
        0.05, "an EMA never looks further back than this share of the images seen", least=0, used="training"
    )
    threads: int | None = key(None, "CPU threads; null: torch's choice", least=1)
    device: str | None = key(None, "null: the GPU when there is one | cpu", choices=(None, "cpu"))
    trackers: tuple[str, ...] = key(
        (),
        "registered trackers that get what is logged, beside use_wandb and loop.tensorboard",
        used="training",
    )
    tensorboard: bool = key(False, "write event files to the run directory's tensorboard/", used="training")
    peak_flops: float | None = key(
        None,
        "operations per second of one device, for the utilization; null: known GPUs, a CPU is measured",
        above=0,
        used="training",
    )
    objective: str | None = key(
        None,
        "the number that a sweeper sees: loss, or one of the evaluation; null: the metric's own, else the loss",
        used="training",
    )


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Group ``wandb``. It has no key: one that stands here would be copied into logs and checkpoints."""

    entity: str | None = key(None, "account or team; null: wandb's default")
    project: str = key("zigflow", "project that the run belongs to")
    mode: str | None = key(
        None,
        "online | offline | disabled; null: WANDB_MODE, else online when there is a key and offline when not",
        choices=(None, "online", "offline", "disabled"),
    )
    name: str | None = key(None, "name of the run; null: that of the run directory")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration of a training run."""

    data: DataSettings = key(REQUIRED, "what is trained on, in which batches, for how long")
    train: TrainSettings = key(REQUIRED, "path, prediction and loss weight of the flow process")
    optim: OptimSettings = key(REQUIRED, "optimizer and learning rate", used="training")
    ode: OdeSettings = key(REQUIRED, "solver of sample_mode=ODE", used="sampling")
    sde: SdeSettings = key(REQUIRED, "solver of sample_mode=SDE", used="sampling")
    loop: LoopSettings = key(REQUIRED, "checkpoints kept, EMA, compilation, sharding, device, progress")
    diffusion: DiffusionSettings = key(
        DiffusionSettings, "samplers of sample_mode=diffusion", used="sampling"
    )
    upsample: UpsampleSettings = key(
        UpsampleSettings,
        "larger images than trained on, without training (docs/sampling.md)",
        used="sampling",
    )
    model: Mapping[str, Any] = key(REQUIRED, "backbone: a class by _target_ with its arguments")
    scan: Mapping[str, Any] = key(REQUIRED, "scan order of every layer: from_model, or a registered name")
    process: Mapping[str, Any] = key(
        REQUIRED, "what is trained: flow, or a diffusion process; a class by _target_ with its arguments"
    )
    codec: Mapping[str, Any] = key(
        REQUIRED, "between pixels and what the model sees: a class by _target_ with its arguments"
    )
    metrics: Mapping[str, Any] | None = key(
        None, "what evaluates samples: a class by _target_ with its arguments", used="sampling"
    )
    wandb: WandbSettings = key(
        WandbSettings, "tracking by wandb, switched on by use_wandb=true", used="training"
    )
    dist: Mapping[str, Any] | None = key(None, "empty group of the official layout")
    ckpt: str | None = key(
        None,
        "weights to start from or to sample: a run directory, one checkpoint in it, or an official .pt file",
    )
    ckpt_patches: str = key(
        "spread",
        "patch layers of ckpt= at another patch size: spread | as_published",
        used="training",
    )
    ckpt_every: int = key(
        50_000, "optimizer steps between checkpoints; the last step is always saved", least=1, used="training"
    )
    log_every: int = key(100, "optimizer steps between lines of the log", least=1, used="training")
    max_grad_norm: float | None = key(
        2.0,
        "gradients are clipped to this norm before the step; null: off; 2.0 unless accelerate was told",
        above=0,
        used="training",
    )
    ema_rate: float | None = key(
        None,
        "the official constant decay per step; null: the profiles of loop.ema_half_life",
        used="training",
    )
    global_seed: int = key(
        0, "seed of initial weights, data order and noise; when sampling, of the sampling noise", least=0
    )
    grad_accum: int = key(
        1, "micro-batches per optimizer step; 1 unless accelerate was told", least=1, used="training"
    )
    is_latent: bool = key(False, "the data holds latents")
    use_latent: bool = key(False, "train on latents: those of the data, or the pixels encoded by codec=")
    use_wandb: bool = key(False, "track the run with wandb", used="training")
    note: str = key("", "free text, kept in the checkpoint's configuration", used="training")
    sample_mode: str | None = key(
        "ODE",
        "ODE | SDE | diffusion (process=gaussian, vp, sd_discrete; ODE and SDE sample those, too)",
        choices=(None, "ODE", "SDE", "diffusion"),
        used="sampling",
    )
    likelihood: bool = key(
        False,
        "bits per dimension of held-out data instead of samples; with sample_mode=diffusion the variational bound",
        used="sampling",
    )
    num_fid_samples: int = key(500, "samples to draw", least=1, used="sampling")
    sample_debug: bool = key(False, "stop sampling after 4 batches", used="sampling")
    sample_dir: str | None = key(None, "folder of the samples; null: RUN_DIR/samples/NAME", used="sampling")
    vae: str = key(
        "ema", "which published autoencoder codec.path holds: ema | mse; recorded", choices=("ema", "mse")
    )
    cfg_scale: float = key(1.0, "guidance scale w: uncond + w (cond - uncond); 1 is off", used="sampling")
    cfg_interval: tuple[float, float] = key((0.0, 1.0), "times at which guidance acts", used="sampling")
    mixed_precision: str | None = key(
        None, "no | fp16 | bf16; null: as accelerate was told, else no", choices=(None, "no", "fp16", "bf16")
    )
    run_dir: str = key(
        REQUIRED, "folder of the run; default outputs/JOB/ID, of a sweep hydra.sweep.dir/NUMBER_OVERRIDES"
    )
    plugins: tuple[str, ...] = key(
        (),
        "files of your own, [my_scans.py, ...]: loaded, and recorded in the checkpoint, which loads them again",
    )
    resume: str = key(
        "auto",
        "auto: the same command with the same run_dir continues it | never: refuse a directory in use",
        choices=("auto", "never"),
        used="training",
    )

    def __post_init__(self):
        if self.ema_rate is not None and not 0 <= self.ema_rate < 1:
            raise SettingsError(
                f"ema_rate={self.ema_rate} is not in [0, 1): give a decay such as 0.9999, or null"
            )
        if self.global_seed >= 2**63:
            raise SettingsError(f"global_seed={self.global_seed} must be less than 2^63")
        for name in ("run_dir", "sample_dir"):
            if getattr(self, name) == "":
                raise SettingsError(f"{name} is empty: give {name}=FOLDER, or drop it")
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
        self.upsample.check(measures=self.measures_data)
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
        frames = model.get("video_frames", 0) or 0
        if frames != self.data.video_frames:
            raise SettingsError(
                f"model.video_frames={frames} and data.video_frames={self.data.video_frames} differ: make them equal"
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
        if not values.get("text"):
            # An empty group that 0.1 had.
            values = {name: value for name, value in values.items() if name != "text"}
        return parse(cls, with_expanded_paths(values), "")
