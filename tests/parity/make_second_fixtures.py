"""Second fixtures with other settings than those in fixtures/, made from the definitions (definitions.py).

    python -m tests.parity.make_second_fixtures FOLDER

The tests make them anew (test_second_fixtures.py). Of the project only the names and shapes of weights are taken.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.parity import definitions as define
from tests.parity.second_core import core
from tests.parity.second_dim import DIM
from tests.parity.second_drawn import DRAWN
from tests.parity.second_networks import networks
from tests.parity.second_processes import PROCESSES, Maker
from tests.parity.second_sampled import sampled_uvit
from tests.parity.second_training import drawn, sampled, stepped
from tests.parity.second_transport import TRANSPORT
from tests.parity.second_zigma import ZIGMA


def functions(maker: Maker) -> None:
    t = torch.tensor([0.0, 3.5, 999.0])
    labels, force = torch.tensor([0, 4, 2]), torch.tensor([0, 1, 1])
    maker.write("dit_functions", {"fixture_kind": "dit.functions", "meaning": {"labeldrop": "num_classes=5"}}, {
        "sincos2d.D8.G3": define.sincos_table(3, 8), "sincos2d.D20.G2": define.sincos_table(2, 20), "temb.t": t,
        "temb.dim12": define.sinusoid(t, 12).float(), "temb.dim5": define.sinusoid(t, 5).float(),
        "labeldrop.labels": labels, "labeldrop.force": force, "labeldrop.out": torch.where(force == 1, 5, labels),
    })  # fmt: skip
    x = torch.randn(1, 2, 6, 9)
    cut = x.reshape(1, 2, 2, 3, 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(1, 6, 18)
    maker.write("uvit_functions", {"fixture_kind": "uvit.functions"}, {
        "x": x, "patchify3": cut, "unpatchify3": x.clone(),
    })  # fmt: skip
    items = [{"H": h, "W": w, "P": p, **{n: define.pad_layout(h, w, p, n) for n in names}}
             for h, w, p, names in ((1, 4, 2, ("rho_pad",)), (4, 2, 4, ("lateral", "rho_pad")))]  # fmt: skip
    maker.write("dim_pads", {"fixture_kind": "dim.pad_layouts", "items": items})
    table = torch.randn(1, 3 + 9, 4)
    grid = table[:, 3:].reshape(1, 3, 3, 4).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, (5, 2), mode="bilinear", align_corners=False)
    maker.write("dim_positions", {"fixture_kind": "dim.pos_interp", "note": "extra (3) tokens kept"}, {
        "in.pos": table, "out.same": table.clone(),
        "out.5x2": torch.cat([table[:, :3], larger.flatten(2).transpose(1, 2)], 1),
    })  # fmt: skip
    items = []
    for h, w, pads, depth, start, length in ((2, 3, 2, 11, 1, 2), (3, 1, 1, 9, 3, 5), (2, 2, 1, 5, 1, 0)):
        orders = define.dim_orders(h + pads, w + pads)
        places = [i * (w + pads) + j for i in range(h) for j in range(w)]
        items.append({
            "num_layers": depth, "encoder_start_blk_id": start, "H": h, "W": w, "pad_len": pads,
            "scan_pattern_len": length, "chain": define.dim_chain(depth, start, length),
            "order_by_pattern": {str(k): v for k, v in list(orders.items())[: length + 1]},
            "x_positions_in_padded_seq": places,
            "pad_positions": [k for k in range((h + pads) * (w + pads)) if k not in places],
        })  # fmt: skip
    maker.write("dim_orders", {"fixture_kind": "dim.scan_orders", "items": items})


def measured(maker: Maker) -> None:
    """Frechet distances of Gaussians with diagonal covariances, and crops of images of one color."""
    mean, a, b = (
        torch.randn(3).double(),
        torch.tensor([1.0, 4.0, 9.0]).double(),
        torch.tensor([4.0, 1.0, 1.0]).double(),
    )
    distance = (mean**2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    maker.write("frechet", {"fixture_kind": "metrics.frechet"}, {
        "mu1": mean, "mu2": torch.zeros(3).double(), "sigma1": torch.diag(a), "sigma2": torch.diag(b),
        "fid": distance[None],
    })  # fmt: skip
    flat = np.full((23, 31, 3), 77, np.uint8)
    small = np.array(Image.fromarray(flat).resize((8, 8)))
    maker.write("crops", {"fixture_kind": "data.image_crops"}, {
        "7.img": torch.from_numpy(flat), "7.adm_crop8": torch.from_numpy(small),
        "7.lanczos_crop11": torch.full((11, 11, 3), 77, dtype=torch.uint8),
    })  # fmt: skip


def zigma_parts(maker: Maker) -> None:
    """Single operations of other sizes; a scan order of another side."""
    torch.manual_seed(3)
    p = {"n.weight": torch.randn(5).double(), "n.bias": torch.randn(5).double()}
    x, rest, t = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.tensor([0.0, 0.3])
    both = (x + rest).double()
    taps, bias, u = torch.randn(3, 1, 3), torch.randn(3), torch.randn(1, 3, 6)
    padded = torch.nn.functional.pad(u, (2, 0))
    out = sum(padded[..., k : k + 6] * taps[:, 0, k : k + 1] for k in range(3)) + bias[:, None]
    maker.write("ops", {"fixture_kind": "zigma.ops", "desc": "fused add+norm (eps 1e-2)"}, {
        "norm/x": x, "norm/residual": rest, "norm/weight": p["n.weight"].float(), "norm/bias": p["n.bias"].float(),
        "norm/rms_out": define.rms_norm(p, "n", both, 1e-2).float(),
        "norm/layer_out_nores": define.layer_norm(x.double(), 1e-2, p, "n").float(),
        "temb/t": t, "temb/sin_10": define.sinusoid(t.double() * 1000, 10).float(),
        "pos/sincos_grid2_dim8": define.sincos_table(2, 8).float(),
        "conv/x": u, "conv/weight": taps, "conv/bias": bias, "conv/out_silu": torch.nn.functional.silu(out),
    })  # fmt: skip
    side = 5
    snake = [i * side + (j if i % 2 == 0 else side - 1 - j) for i in range(side) for j in range(side)]
    maker.write("scan_paths", {
        "fixture_kind": "zigma.scan_paths",
        f"N={side}": {"traverse_grid_v1_continuous": [snake, snake[::-1]]},
    })  # fmt: skip


PARTS = (
    *(networks, functions, measured, zigma_parts, stepped, sampled, sampled_uvit, core, drawn),
    *DRAWN,
    *ZIGMA,
    *DIM,
    *TRANSPORT,
    *PROCESSES,
)


def make(folder: Path, parts: tuple = PARTS) -> set[str]:
    """Write the fixtures of some parts into a folder; their kinds."""
    maker = Maker(folder)
    for part in parts:
        torch.manual_seed(0)
        part(maker)
    return maker.kinds


if __name__ == "__main__":
    sys.stdout.write("\n".join(sorted(make(Path(sys.argv[1])))) + "\n")
