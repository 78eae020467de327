"""Samples per second of the loader against the webdataset library's own, on the same tars in the same run.

Latents (4, 32, 32) float32 and JPEG images of 256 x 256, at 0 to 4 workers; and the share of its time that a step of
the digits demo waits for data. Each case reads the whole set several times in turn with its peer; the median counts.

    python benchmarks/loader.py --output benchmarks/results/loader_cpu.json
"""

import argparse
import io
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from machine import Report, circumstances
from PIL import Image
from torch.utils.data import DataLoader

from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import training_loader
from zigflow.data.order import DataOrder
from zigflow.data.shard_urls import import_webdataset
from zigflow.data.writer import ShardWriter, encode_npy
from zigflow.datasets.shards import ShardSource  # pyright: ignore[reportMissingImports]
from zigflow.engine.log import read_metrics
from zigflow.plugins import compose_config
from zigflow.train_job import train_from_config

BATCH = 32


def write(folder, kind, count):
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=max(count // 8, 1)) as writer:
        for index in range(count):
            if kind == "latents":
                members = {"latent.npy": encode_npy(random.standard_normal((4, 32, 32)).astype(np.float32))}
            else:
                coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(coarse).resize((256, 256)).save(stream, "JPEG", quality=90)
                members = {"image.jpg": stream.getvalue()}
            writer.add(f"{index:06d}", {**members, "cls": b"3"})


def ours(folder, workers, count):
    source = ShardSource(folder, num_classes=10)
    order = DataOrder(source.shard_sizes, 0)
    return training_loader(source, order, GlobalBatch(BATCH), stop_step=count // BATCH, num_workers=workers)


def _latents(sample):
    return torch.from_numpy(np.load(io.BytesIO(sample["latent.npy"]))), int(sample["cls"])


def _images(sample):
    image = np.array(Image.open(io.BytesIO(sample["image.jpg"])).convert("RGB"))
    pixels = torch.from_numpy(image).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)
    return pixels, int(sample["cls"])


def peer(folder, workers, kind):
    """The library's own pipeline with the same work: shuffle, decode, batch."""
    urls = sorted(map(str, Path(folder).glob("*.tar")))
    decode = _latents if kind == "latents" else _images
    dataset = (
        import_webdataset()
        .WebDataset(urls, shardshuffle=8, seed=0)
        .shuffle(1000)
        .map(decode)
        .batched(BATCH, partial=False)
    )
    return DataLoader(dataset, batch_size=None, num_workers=workers)


def rate(loader):
    """Samples per second, and per second of this process's CPU time, from the first request to the last batch."""
    started, cpu, seen = time.perf_counter(), time.process_time(), 0
    for batch in loader:
        seen += batch.size if hasattr(batch, "size") else len(batch[1])
    return seen / (time.perf_counter() - started), seen / (time.process_time() - cpu)


def demo_wait(folder):
    """The share of the demo's time that waits for data, from its own log."""
    run_dir = folder / "run"
    overrides = [
        f"run_dir={run_dir}",
        f"data.source.root={folder / 'digits'}",
        f"data.heldout.root={folder / 'digits'}",
        "data.train_steps=60",
        "optim.warmup_steps=0",
        "log_every=20",
        "metrics=none",
        "loop.device=cpu",
        "loop.progress=false",
    ]
    train_from_config(compose_config(overrides))
    rows = read_metrics(run_dir / "metrics.jsonl")[1:]
    return {
        "data_wait_share": statistics.median(row["data_wait"] for row in rows),
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "num_workers": 0,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = {
        **circumstances(note=args.note),
        "libraries": {"numpy": np.__version__, "webdataset": import_webdataset().__version__},
        "what": "samples per second, page cache warm, from the start of the workers to the last batch; median of "
        f"{args.repeats} turns; ratio: ours over the library's",
    }  # fmt: skip
    with Report(start, args.output) as report, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, count in (("latents", args.latents), ("images", args.images)):
            write(folder / kind, kind, count)
            report[kind] = {"samples": count, "batch_size": BATCH}
            rate(ours(folder / kind, 0, count))
            for workers in args.workers:
                pairs = [
                    (rate(ours(folder / kind, workers, count)), rate(peer(folder / kind, workers, kind)))
                    for _ in range(args.repeats)
                ]
                own, other = (
                    statistics.median(side[0] for side in sides) for sides in zip(*pairs, strict=True)
                )
                row = {
                    "zigflow": round(own, 1),
                    "webdataset": round(other, 1),
                    "ratio": round(own / other, 2),
                }
                if not workers:
                    # A busy machine takes wall time from both and CPU time from neither.
                    own, other = (
                        statistics.median(s[1] for s in sides) for sides in zip(*pairs, strict=True)
                    )
                    row["ratio_by_cpu_time"] = round(own / other, 2)
                report[kind][f"{workers} workers"] = row
                report.save()
        report["demo_step"] = demo_wait(folder)


if __name__ == "__main__":
    main()
