"""Which parameters of a model follow the size of its input, so that weights of one size start a model of another.

Legend: p patch size, h w token grid, T frames, E extra tokens, D width, C channels.
"""

from dataclasses import dataclass

__all__ = ["FREE_KEYWORDS", "Resizing"]

# Keywords of a constructor that change sizes or the way of training, and nothing that the other weights mean.
FREE_KEYWORDS = (
    "img_dim", "patch_size", "video_frames", "num_classes", "class_dropout_prob", "drop_path_rate", "use_checkpoint",
    "guided_channels",
)  # fmt: skip


@dataclass(frozen=True)
class Resizing:
    """What a model says about its parameters of other sizes; names without their prefix stand for all that end so.

    Attributes:
        grid: (T, h, w) in tokens, T = 1 for images; None: nothing is resized.
        patch_size: p.
        positions: tables of positions (1, E + T h w, D), resampled as by ``zigflow.nn.interpolate_positions``.
        mode: of the resampling.
        frames: tables (1, T, D), resampled linearly.
        outputs: layers that give the pixels of a patch, weights (p p C, ...), the channel fastest.
        keywords: keywords of the constructor in which the model of the weights may differ.
    """

    grid: tuple[int, int, int] | None = None
    patch_size: int | None = None
    positions: tuple[str, ...] = ()
    mode: str = "bicubic"
    frames: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    keywords: tuple[str, ...] = FREE_KEYWORDS

    def is_positions(self, parameter: str) -> bool:
        """Whether a parameter of this name is a table of positions."""
        return self.grid is not None and _named(parameter, self.positions)

    def is_frames(self, parameter: str) -> bool:
        """Whether a parameter of this name is a table of frames."""
        return _named(parameter, self.frames)

    def is_output(self, parameter: str) -> bool:
        """Whether a parameter of this name belongs to a layer that gives pixels."""
        return _named(parameter.rpartition(".")[0], self.outputs)


def _named(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
