"""``count-flops``: what one sample costs a model, without computing it."""

import argparse

from zigflow import plugins
from zigflow.nn.flops import TRAINING_FACTOR, count_flops
from zigflow.settings import SettingsError
from zigflow.shapes import frames_of


def main(argv: list[str]) -> int:
    """Print parameters and operations per sample, by module; the convention is in zigflow/nn/flops.py."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools count-flops",
        description="Count parameters and floating-point operations per sample; a multiply-add is two.",
    )
    parser.add_argument("overrides", nargs="*", help="GROUP=CHOICE and KEY=VALUE, as for train_acc.py")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to show (default 2)")
    args = parser.parse_intermixed_args(argv)
    try:
        settings = plugins.validated(plugins.compose_config([*args.overrides, "run_dir=outputs/counted"]))
    except Exception as error:
        line = plugins.explain(error, "default")
        if line is None:
            raise
        raise ValueError(line) from error
    if settings.model.get("video_frames", 1) == 0:
        raise SettingsError(
            f"model={settings.model.get('name')} is one of videos and takes its number of frames from the data, "
            f"data={settings.data.name} has none: give data.video_frames=16 (and data.num_classes), or data=ucf101"
        )
    import torch

    from zigflow.build import build_model
    from zigflow.nn import as_denoiser

    with torch.device("meta"):
        # Shapes alone: no model is too large to be counted.
        model = build_model(settings)
    count = count_flops(model)
    rows = [("module", "parameters", "GFLOPs", "GMACs", "share")]
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters())
        flops = count.modules.get(name, 0)
        if name.count(".") < args.depth and (own or flops):
            share = f"{100 * flops / count.forward:.1f} %"
            rows.append((name or "(all)", f"{own:,}", f"{flops / 1e9:.4g}", f"{flops / 2e9:.4g}", share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)))
    print()
    for operator, flops in sorted(count.operators.items(), key=lambda item: -item[1]):
        print(f"{operator}: {100 * flops / count.forward:.1f} %")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}, trained: {trained:,}")
    frames = frames_of(as_denoiser(model).sample_shape)
    sample = f"sample of {frames} frames" if frames else "sample"
    print(f"forward:  {count.forward:,} FLOPs per {sample} ({count.macs / 1e9:.4g} GMACs)")
    print(
        f"as DiT's paper counts (a multiply-add is one, a normalized value one): {count.published / 1e9:.2f} Gflops"
    )
    print(f"training: {count.training:,} FLOPs per {sample} ({TRAINING_FACTOR} x forward)")
    print("One multiply-add is two FLOPs; counted are matrix products, convolutions, attention and scans.")
    return 0
