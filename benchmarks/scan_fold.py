"""What becomes of a block's two scan gathers under torch.compile.

Compiles one block with a raster walk and with a zigzag walk and compares the generated code: kernels, those that
gather and do nothing else, buffers, and the operators of this project between them. Kernels are named after what they
fuse. Twice: with the operators that would run on this device, and with the norm, modulation, gather and gate left to
torch ("fused by torch"). A CPU's kernels say nothing of a GPU's.

    python benchmarks/scan_fold.py --output benchmarks/results/NAME.json
"""

import argparse
import re
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from machine import Report, chosen_device, circumstances
from torch._inductor.utils import run_and_get_code

from dis_kernels.tokenwise import backends
from model_zigma import ZigMa

WALKS = {"raster": "v1", "zigzag": "zigzagN8"}


def generated(model, args, backward):
    """The inductor source of one block's forward, or forward and backward."""
    torch._dynamo.reset()
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True)

    def step():
        hidden, residual, c, walk = args
        hidden = hidden.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            out, stream = compiled(hidden, residual, c, walk)
        if backward:
            (out.square().mean() + stream.square().mean()).backward()
        return out

    _, sources = run_and_get_code(step)
    return "\n".join(sources)


def describe(source):
    kernels = re.findall(r"(?:cpp_fused|triton_\w+?_fused)_\w+ = ", source)
    names = [k.removesuffix(" = ") for k in kernels]
    alone = [
        n for n in names if re.fullmatch(r"(?:cpp|triton_\w+?)_fused_(?:index_select|index)(?:_\d+)?", n)
    ]
    return {
        "kernels": len(names),
        "names": names,
        "operators": re.findall(r"torch\.ops\.zigflow\.(\w+)\.default\(", source),
        "gather_only_kernels": alone,
        "kernels_with_gather": [n for n in names if "index" in n],
        "extern_index_calls": len(re.findall(r"aten\.index(?:_select)?\b.*\(", source)),
        "buffers": len(re.findall(r"= empty_strided", source)),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = chosen_device(args.device)
    start = {
        **circumstances(device),
        "shape": {"width": args.width, "side": args.side, "batch": args.batch},
    }
    with Report(start, args.output) as report:
        for (name, scan), fused in product(WALKS.items(), ("ours", "fused by torch")):
            model = ZigMa(
                in_channels=4, embed_dim=args.width, depth=2, img_dim=args.side, scan_type=scan, device=device
            )
            walk = model.orders.at(model.token_grid, device)[1]
            tokens = (args.batch, args.side * args.side, args.width)
            shapes = (tokens, tokens, (args.batch, args.width))
            inputs = (*(torch.randn(shape, device=device) for shape in shapes), walk)
            with ExitStack() as stack:
                if fused != "ours":
                    for dispatcher in (backends.READ, backends.WRITE):
                        stack.enter_context(patch.object(dispatcher, "backends", dispatcher.backends[-1:]))
                for mode in ("forward", "forward_backward"):
                    report[f"{fused}/{name}/{mode}"] = describe(generated(model, inputs, mode != "forward"))
                    report.save()


if __name__ == "__main__":
    main()
