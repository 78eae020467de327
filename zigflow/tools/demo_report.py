"""``demo-report``: a sampled run in a few lines."""

import argparse
from pathlib import Path

from zigflow.metrics.results import read_results

ROWS = {
    "classifier_heldout_accuracy": ("the judge's accuracy on held-out images", ">="),
    "agreement": ("samples that show the class asked for", ">="),
    "coverage": ("held-out images with a sample nearby", ">="),
    "nearest_train_distance_ratio": ("distance to training images, samples / held-out", ">="),
    "frechet_ratio": ("Frechet distance / real-to-real floor", "<="),
    "frechet_copies_ratio": ("  of training images drawn with replacement", ""),
}


def main(argv: list[str]) -> int:
    """Print the judgement and where the pictures lie; with --check, 1 when a threshold is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools demo-report", description="Report on a sampled run."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory that sample_acc.py has sampled from")
    parser.add_argument("--check", action="store_true", help="fail when a threshold is missed")
    args = parser.parse_args(argv)
    found = sorted(args.run_dir.glob("samples/*/results.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no samples/*/results.json under {args.run_dir}; run sample_acc.py ckpt={args.run_dir}"
        )
    metrics, protocol = read_results(found[-1])
    thresholds = protocol.get("thresholds", {})
    for name, (text, sign) in ROWS.items():
        if name in metrics:
            bound = f"  ({sign} {thresholds[name]})" if name in thresholds else ""
            print(f"{text:50s} {metrics[name]:8.4f}{bound}")
    print(
        f"samples: {protocol['n']}, guidance {protocol['guidance']['scale']:g}, sampler {protocol['sampler']}"
    )
    print(f"sample grid  {found[-1].with_name('grid.png')}")
    print(f"loss curve   {args.run_dir / 'loss.png'}")
    print(f"results      {found[-1]}")
    if args.check and not metrics.get("passed", True):
        print("a threshold was missed")
        return 1
    return 0
