"""Does torch.compile fold a block's two scan gathers into the norm before and the add after?

Compiles one block with a raster walk and with a zigzag walk and compares the generated code: kernels,
kernels that do nothing but gather, and buffers. Prints JSON.

    python benchmarks/scan_fold.py --output benchmarks/results/NAME.json
"""

import argparse
import json
import platform
import re
import sys
from pathlib import Path

import torch
from torch._inductor.utils import run_and_get_code

from model_zigma import ZigMa


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
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = {
        "command": " ".join(sys.argv),
        "hardware": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "shape": {"width": args.width, "side": args.side, "batch": args.batch},
    }
    for name, scan in (("raster", "v1"), ("zigzag", "zigzagN8")):
        model = ZigMa(in_channels=4, embed_dim=args.width, depth=2, img_dim=args.side, scan_type=scan)
        walk = model._walks(model.grid, torch.device("cpu"))[1]
        tokens = (args.batch, args.side * args.side, args.width)
        inputs = (torch.randn(tokens), torch.randn(tokens), torch.randn(args.batch, args.width), walk)
        for mode in ("forward", "forward_backward"):
            report[f"{name}/{mode}"] = describe(generated(model, inputs, mode != "forward"))
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
