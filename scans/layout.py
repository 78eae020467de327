"""TokenLayout: learned tokens beside the raster, in front of it (DiS, DiM) or at its row ends (DiM)."""

from typing import Literal

import numpy as np

from scans.path import Order, ScanPath
from scans.registry import check_grid


class TokenLayout:
    """Where n raster tokens and the rows of a table of learned tokens stand in a sequence of L' tokens.

    ``source`` is all that a model needs to build the sequence: with ``table`` the learned tokens (E, D),
    ``torch.cat([x, table.expand(B, -1, -1)], 1)[:, source]`` is (B, L', D), and ``y[:, positions]`` brings
    the raster tokens back. The first ``num_prefix`` tokens keep their place under every scan path;
    what follows is the body, a grid of ``body_shape`` (pads included) when it is one.

    Args:
        source: (L',) integers; below n the raster token, n + e the learned token e. Each raster token
            stands in one place; a learned one may stand in several.
        num_raster: n.
        num_prefix: leading tokens that no path moves.
        body_shape: grid of the tokens after the prefix, or None.

    Raises:
        TypeError: ``source`` does not hold integers.
        ValueError: a raster token is missing, repeated or in the prefix, a learned token is never used,
            an index is negative, or the body is not a grid of that shape.

    Attributes:
        positions: (n,) place of each raster token.
        num_learned: rows of the table of learned tokens.
    """

    def __init__(
        self,
        source: np.ndarray,
        num_raster: int,
        num_prefix: int = 0,
        body_shape: tuple[int, ...] | None = None,
    ):
        given = np.asarray(source)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"a token layout holds integers, got dtype {given.dtype}")
        self.source: Order = given.astype(np.int64)
        self.num_raster = num_raster
        self.num_prefix = num_prefix
        self.body_shape = body_shape
        used = np.unique(self.source)
        self.num_learned = int(used[-1]) + 1 - num_raster if used.size else 0
        if not np.array_equal(used, np.arange(num_raster + max(self.num_learned, 0))):
            raise ValueError(
                f"a token layout places {num_raster} raster tokens, each once, and learned tokens "
                f"{num_raster}, {num_raster + 1}, ... without a gap; it got the indices {used.tolist()[:20]}"
            )
        raster = self.source < num_raster
        if raster.sum() != num_raster or raster[:num_prefix].any():
            raise ValueError(f"every raster token stands in one place, after the {num_prefix} prefix tokens")
        if body_shape is not None and int(np.prod(body_shape)) != self.body_length:
            raise ValueError(f"a body of {self.body_length} tokens is not a grid of {body_shape}")
        self.positions: Order = np.empty(num_raster, dtype=np.int64)
        self.positions[self.source[raster]] = np.flatnonzero(raster)
        self.source.flags.writeable = False
        self.positions.flags.writeable = False

    @classmethod
    def plain(cls, num_raster: int) -> "TokenLayout":
        """The raster alone."""
        return cls.prefix(num_raster, 0)

    @classmethod
    def prefix(cls, num_raster: int, num_prefix: int) -> "TokenLayout":
        """Learned or condition tokens 0..num_prefix-1, then the raster (DiS: class and time tokens)."""
        (num_raster,) = check_grid((num_raster,))
        if num_prefix < 0:
            raise ValueError(f"num_prefix is not negative, got {num_prefix}")
        return cls(np.r_[num_raster : num_raster + num_prefix, :num_raster], num_raster, num_prefix)

    @classmethod
    def row_end_pads(
        cls,
        h: int,
        w: int,
        num_pads: int,
        bottom: Literal["rows", "cycle"] | None = "rows",
        num_prefix: int = 0,
    ) -> "TokenLayout":
        """Pads 0..P-1 after every row, and P more rows of pads below (DiM, P = 3).

        The body is a grid (h + P, w + P), or (h, w + P) with ``bottom=None``. In the table the prefix
        tokens come first, then the P pads.

        Args:
            bottom: "rows": the k-th added row is pad k throughout (DiM at 256 pixels, "lateral");
                "cycle": the added rows read pad 0, 1, .., P-1, 0, 1, .. in raster order ("rho_pad");
                None: no added rows.

        Raises:
            ValueError: a size below 1, a negative number of pads or prefix tokens, or an unknown ``bottom``.
        """
        h, w = check_grid((h, w))
        if num_pads < 0 or num_prefix < 0:
            raise ValueError(f"num_pads and num_prefix are not negative, got {num_pads} and {num_prefix}")
        first_pad = h * w + num_prefix
        pads = first_pad + np.arange(num_pads)
        rows = np.concatenate([np.arange(h * w).reshape(h, w), np.tile(pads, (h, 1))], axis=1)
        if bottom == "rows":
            below = np.tile(pads[:, None], (1, w + num_pads))
        elif bottom == "cycle":
            below = np.resize(pads, (num_pads, w + num_pads))
        elif bottom is None:
            below = rows[:0]
        else:
            raise ValueError(f"bottom must be 'rows', 'cycle' or None, got {bottom!r}")
        body = np.concatenate([rows, below])
        source = np.r_[h * w : first_pad, body.ravel()]
        return cls(source, h * w, num_prefix, (body.shape[0], body.shape[1]))

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        grid = f", body_shape={self.body_shape}" if self.body_shape else ""
        return (
            f"TokenLayout(length={len(self)}, num_raster={self.num_raster}, num_prefix={self.num_prefix}, "
            f"num_learned={self.num_learned}{grid})"
        )

    @property
    def body_length(self) -> int:
        """Tokens after the prefix."""
        return len(self) - self.num_prefix

    def lift(self, path: ScanPath) -> ScanPath:
        """A path over the body as a path over all L' tokens, the prefix staying in front.

        Raises:
            ValueError: the path is not over the body; with row-end pads it is built on ``body_shape``.
        """
        if len(path) != self.body_length:
            grid = f" (a grid of {self.body_shape})" if self.body_shape else ""
            raise ValueError(
                f"path {path.name!r} has {len(path)} tokens; this layout's paths are over the "
                f"{self.body_length} tokens after its prefix{grid}"
            )
        front = np.arange(self.num_prefix)
        return ScanPath(np.concatenate([front, path.order + self.num_prefix]), name=path.name)
