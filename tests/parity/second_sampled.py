"""Second fixtures of U-ViT sampled from end to end, by the definitions; see make_second_fixtures.py."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.parity import definitions as define
from tests.parity.second_dim import solved
from tests.parity.second_networks import model_fixture, random_state
from tests.parity.second_processes import Maker

UVIT = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}


def stored_uvit(maker: Maker, name: str, family: str, more: dict, y: Tensor | None) -> Callable:
    """A stored U-ViT of that name; its noise (x, net time, condition) in float64."""
    kwargs = {**UVIT, **more}
    model_fixture(maker, name, family, kwargs, y, times=[3, 998], size=(1, 4, 4))
    p = {k: v.double() for k, v in random_state(family, kwargs, maker.seed(name)).items()}

    def noise(x: Tensor, t: float, y: Tensor | None) -> Tensor:
        return define.uvit(p, kwargs, x.double(), torch.full((len(x),), t), y)

    return noise


def sampled_uvit(maker: Maker) -> None:
    """The table with labels at order 2 and with text at order 1, continuous time without a condition at order 1."""
    z = torch.randn(2, 1, 4, 4)
    labels, text, empty = torch.tensor([1, 0]), torch.randn(2, 3, 5), torch.randn(3, 5)
    for name, family, more, given, null, stored, steps, order, scale in (
        ("labels", "uvit", {"num_classes": 3}, labels, torch.tensor([2, 2]), {"y": labels}, 5, 2, 0.7),
        ("text", "uvit_t2i", {"clip_dim": 5, "num_clip_token": 3}, text.double(), empty.double().expand(2, -1, -1),
         {"context": text, "empty_context": empty}, 3, 1, 2.5),
    ):  # fmt: skip
        noise = stored_uvit(maker, f"uvit_for_{name}", family, more, text if name == "text" else labels)

        def guided(x: Tensor, t: float, noise=noise, given=given, null=null, scale=scale) -> Tensor:
            cond = noise(x, t, given)
            return cond + scale * (cond - noise(x, t, null))

        final, _ = solved(lambda x, s, guided=guided: guided(x, 1000 * s), z, steps, 0.1, order, True)
        maker.write(f"uvit_end_{name}", {
            "fixture_kind": "uvit.end_to_end", "state_from": f"uvit_for_{name}", "scale": scale, "steps": steps,
            "order": order, "eps": 0.1, "meaning": "dpm_solver_pp",
        }, {"z": z, **stored, "cfg_out_t250": guided(z, 250.0).float(), "final": final.float()})  # fmt: skip
    noise, steps, end = stored_uvit(maker, "uvit_for_plain", "uvit", {}, None), 4, 0.05
    grid, x = [1 - (1 - end) * i / steps for i in range(steps + 1)], z.double()
    for t, s in itertools.pairwise(grid):
        bar, after = (math.exp(-(0.1 * r + 9.95 * r**2)) for r in (t, s))
        eps = noise(x, 999 * t, None)
        x = math.sqrt(after) * (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar) + math.sqrt(1 - after) * eps
    maker.write("uvit_end_plain", {
        "fixture_kind": "uvit.end_to_end", "state_from": "uvit_for_plain", "steps": steps, "order": 1,
        "method": "singlestep",
        "meaning": "eval_ldm.py, dpm_solver_pytorch with skip_type=time_uniform; eps of .05",
    }, {"z": z, "cfg_out_t700": noise(z, 700.0, None).float(), "final": x.float()})  # fmt: skip
