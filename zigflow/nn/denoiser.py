"""What the engine asks of a backbone: the protocol, its defaults, and the check that a model meets it."""

from collections.abc import Mapping, Sequence
from inspect import getattr_static, signature
from typing import Any, Protocol, cast

from torch import Tensor, nn

from zigflow.registry import unknown_name
from zigflow.shapes import sample_shape

from .checkpointing import CHECKPOINT_POLICIES
from .compilation import compile_in_place
from .conditioning import NO_NULL
from .resizing import Resizing

__all__ = ["Denoiser", "DenoiserDefaults", "as_denoiser", "check_denoiser"]


class Denoiser(Protocol):
    """A network that predicts from a noisy sample, a time per sample, and a condition.

    A model needs ``forward`` and ``sample_shape``, which follows from ``in_channels`` and ``img_dim`` where it has
    them; each other member has a default in :class:`DenoiserDefaults`. The engine asks through :func:`as_denoiser`, so
    that any ``nn.Module`` with these two will do. The families here derive from ``zigflow.nn.backbone.Backbone``.
    """

    def forward(self, x: Tensor, t: Tensor, y: Any = None, return_features: tuple[str, ...] = ()) -> Any:
        """The prediction, shaped like x (B, *sample_shape), or with twice the channels: also a variance.

        t is (B,), as ``time_scale`` and ``time_factor`` say. With ``return_features`` also a dict of features by name.
        """
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (T, C, H, W) of a video: the sample that the model was built for."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of classes whose labels (B,) the model reads; 0 or less: none."""
        ...

    @property
    def has_text(self) -> bool:
        """Whether the model reads text tokens (B, n_context_token, d_context)."""
        ...

    @property
    def d_context(self) -> int:
        """The width of a text token."""
        ...

    @property
    def n_context_token(self) -> int:
        """The number of text tokens."""
        ...

    @property
    def time_scale(self) -> float:
        """What flow times in [0, 1] are multiplied by before the model is fed."""
        ...

    @property
    def time_factor(self) -> float:
        """What the times of diffusion processes, 0..1000, are divided by before the model is fed."""
        ...

    @property
    def has_null(self) -> bool:
        """Whether ``null_condition`` has an answer."""
        ...

    def null_condition(self, y: Any) -> Any:
        """The condition that stands for "none" in guidance, built like ``y``.

        Raises:
            ValueError: the model has none.
        """
        ...

    @property
    def guided_channels(self) -> int | None:
        """How many of the first channels guidance acts on; None: those of the prediction."""
        ...

    def named_blocks(self) -> Mapping[str, nn.Module]:
        """Every block by its name in the state dict, in the order in which they run."""
        ...

    def set_checkpoint_policy(self, policy: str) -> None:
        """none, block or selective; may change at any time, also on resume."""
        ...

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place; keys of the state dict stay as they are."""
        ...

    def shard_units(self) -> Sequence[nn.Module]:
        """The modules whose parameters may be sharded apart."""
        ...

    @property
    def scan_name(self) -> str:
        """What the configuration calls the scan; "" for a model without scans."""
        ...

    def scan_walks(self) -> Sequence[Sequence[Tensor | int | None]] | None:
        """For each layer the integers and index tensors that it walks by, None in a raster's place.

        None for a model without scans.
        """
        ...

    def scan_walks_at(self, grid: tuple[int, int, int]) -> Sequence[Sequence[Tensor | int | None]] | None:
        """What ``scan_walks()`` of the same model, built for a token grid (T, h, w), would give; None: not known."""
        ...

    def scan_state(self) -> Mapping[str, Tensor]:
        """The orders that a checkpoint must carry, those of random scans, by name."""
        ...

    @property
    def token_grid(self) -> tuple[int, int, int] | None:
        """(T, h, w) in tokens of the sample that the model was built for, T = 1 for images; None without a grid."""
        ...

    def resizing(self) -> Resizing:
        """Which parameters follow the size of the input, and how."""
        ...

    def set_skip_tuning(self, mode: str | None, bounds: tuple[float, float]) -> None:
        """Weigh the long skips from now on, see ``zigflow.nn.skip_tuning``.

        Raises:
            ValueError: the model has no long skips.
        """
        ...


MEMBERS = frozenset(name for name in vars(Denoiser) if not name.startswith("_"))


class DenoiserDefaults:
    """What a model answers that does not say otherwise; the members are described in :class:`Denoiser`."""

    num_classes: int = -1
    has_text: bool = False
    d_context: int = 0
    n_context_token: int = 0
    time_scale: float = 1.0
    time_factor: float = 1.0
    guided_channels: int | None = None

    @property
    def scan_name(self) -> str:
        return ""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """By ``in_channels``, ``img_dim`` (a side or (H, W)) and, for videos, ``video_frames``.

        Raises:
            ValueError: the model has no such attributes.
        """
        given = (getattr(self, name, None) for name in ("in_channels", "img_dim", "video_frames"))
        shape = sample_shape(*given)
        if shape is None:
            raise ValueError(
                f"{_class_name(self)} does not say what it reads: give it sample_shape = (C, H, W), for videos "
                "(T, C, H, W); or in_channels and img_dim"
            )
        return shape

    @property
    def has_null(self) -> bool:
        return getattr(self.null_condition, "__func__", None) is not DenoiserDefaults.null_condition

    def null_condition(self, y: Any) -> Any:
        raise ValueError(NO_NULL)

    def named_blocks(self) -> Mapping[str, nn.Module]:
        """The modules in the list ``blocks``, where there is one."""
        blocks = getattr(self, "blocks", None)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            return {}
        return {f"blocks.{i}": block for i, block in enumerate(blocks)}

    def set_checkpoint_policy(self, policy: str) -> None:
        """Raises:
        UnknownNameError: another policy than none, block, selective.
        ValueError: no blocks, or blocks that are not ``CheckpointedBlock``s.
        """
        if policy not in CHECKPOINT_POLICIES:
            raise unknown_name("checkpoint policy", policy, list(CHECKPOINT_POLICIES))
        blocks = self.named_blocks().values()
        if policy != "none" and not all(hasattr(block, "checkpoint_policy") for block in blocks or [None]):
            raise ValueError(
                f"checkpoint_policy={policy} needs set_checkpoint_policy() or named_blocks() that are "
                f"CheckpointedBlocks, and {_class_name(self)} has neither"
            )
        for block in blocks:
            block.checkpoint_policy = policy  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """Raises:
        ValueError: the model has no blocks.
        """
        blocks = self.named_blocks()
        if not blocks:
            raise ValueError(
                f"compile=true needs a model with blocks or compile_blocks(); {_class_name(self)} has neither"
            )
        compile_in_place(blocks.values(), **options)

    def shard_units(self) -> Sequence[nn.Module]:
        return list(self.named_blocks().values())

    def scan_walks(self) -> Sequence[Sequence[Tensor | int | None]] | None:
        return None

    def scan_walks_at(self, grid: tuple[int, int, int]) -> Sequence[Sequence[Tensor | int | None]] | None:
        return None

    def scan_state(self) -> Mapping[str, Tensor]:
        return {}

    @property
    def token_grid(self) -> tuple[int, int, int] | None:
        return None

    def resizing(self) -> Resizing:
        return Resizing()

    def set_skip_tuning(self, mode: str | None, bounds: tuple[float, float]) -> None:
        raise ValueError(
            f"{_class_name(self)} has no long skip connections to tune: drop skip tuning, or choose a model that has "
            "some, such as a DiM or a U-ViT"
        )


class _Completed(DenoiserDefaults):
    """A model, and the defaults for what it does not answer; the model itself stays as it is."""

    def __init__(self, model: Any):
        self._model = model

    def __getattribute__(self, name: str) -> Any:
        if name in MEMBERS:
            model = object.__getattribute__(self, "_model")
            # A property of the model that fails is a mistake of the model's, and no reason for the default.
            if hasattr(model, name) or getattr_static(model, name, None) is not None:
                return getattr(model, name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)


def as_denoiser(model: Any) -> Denoiser:
    """The model as the engine asks it: itself, or with the defaults for what a plain module or function lacks."""
    return cast(Denoiser, model if isinstance(model, DenoiserDefaults) else _Completed(model))


def check_denoiser(model: nn.Module) -> Denoiser:
    """Refuse a model without the required members.

    Raises:
        ValueError: ``forward`` does not take (x, t, y), or the shape of a sample is not known; one line.
    """
    name = type(model).__name__
    takes = signature(model.forward)
    try:
        takes.bind(None, None, None)
        takes.bind(None, None, y=None)
    except TypeError as error:
        raise ValueError(
            f"{name}.forward{takes} is not called as forward(x, t, y=None, return_features=()): {error}"
        ) from None
    found = as_denoiser(model)
    shape = found.sample_shape
    if len(shape) not in (3, 4) or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"{name}.sample_shape is (C, H, W), or (T, C, H, W) for videos, got {shape!r}")
    return found


def _class_name(model: Any) -> str:
    return type(getattr(model, "_model", model)).__name__
