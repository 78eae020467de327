"""``make-shards``: write indexed shards from the digits, images, idx files (MNIST and its kin), or published features.

Training and held-out parts go to OUTPUT/train and OUTPUT/heldout; without a split everything goes to OUTPUT. Samples
are written in mixed order, the same for the same seed: whoever reads a few shards at a time sees all classes.
"""

import argparse
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from zigflow.data.class_names import renumbered, shown
from zigflow.data.picture import WHITE, background_color, read_image
from zigflow.data.published_crops import CROPS
from zigflow.data.shard_index import INDEX_NAME, load_folder_index
from zigflow.data.split import stratified_split
from zigflow.data.writer import ORDERS, ShardWriter, encode_npy, encode_png, writing_order
from zigflow.files import publishing_folder

_IDX_KINDS = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_IDX = 1 << 31
_MEMBERS = {"jpeg": "jpg", "tif": "tiff"}
_INPUTS = {
    "folder": "the folder of images",
    "idx": "the idx file of the images",
    "latent-features": "the folder of 0.npy or 0.npy.npz, 1.npy, ...",
    "coco-features": "the folder of train/, val/ and empty_context.npy; val/ becomes OUTPUT/heldout",
}


def main(argv: list[str]) -> int:
    """Run the command; 0 on success.

    Raises:
        ValueError: an input is malformed or options contradict each other.
        OSError: a file is missing or the output exists.
    """
    args = _parser().parse_args(argv)
    if args.shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1, got {args.shard_size}")
    if args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} is not empty: choose another --output")
    if getattr(args, "resize", None) is not None and args.resize < 1:
        raise ValueError(f"--resize must be at least 1, got {args.resize}")
    args.run(args)
    total = 0
    for path in sorted(args.output.rglob(INDEX_NAME)):
        index = load_folder_index(path.parent)
        shards, names = index.shards, index.meta.get("class_names") or ()
        samples = sum(shard.samples for shard in shards)
        total += samples
        plural = "" if len(shards) == 1 else "s"
        size = sum(shard.size for shard in shards)
        classes = f", {len(names)} classes ({shown(names)})" if names else ", no labels"
        print(f"{path.parent}: {samples} samples in {len(shards)} shard{plural}, {size} bytes{classes}")
        for name, place in renumbered(names)[:1]:
            print(f"classes are named by numbers that are not theirs: {name} is class {place}, and so on")
    print(f"{total} samples written to {args.output}")
    enlarged = getattr(args, "enlarged", ())
    if enlarged:
        print(
            f"{len(enlarged)} images are smaller than --resize {args.resize} and were enlarged, such as {enlarged[0]}"
        )
    sizes = len(getattr(args, "sizes", ()))
    if sizes > 1:
        print(
            f"the images have {sizes} sizes: train with data.image_size=N, or write them again with --resize N"
        )
    return 0


def read_idx(path: Path, limit: int = _MAX_IDX) -> np.ndarray:
    """Read an idx file, gzipped or not.

    The format: two zero bytes, a type code, the number of dimensions, each dimension as a big-endian 32-bit
    number, the values.

    Raises:
        ValueError: the header is malformed, the data are shorter or longer than it says, or larger than ``limit``.
    """
    raw = path.read_bytes()
    read = _gunzip(raw, path) if raw[:2] == b"\x1f\x8b" else _slice(raw)
    head = read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_KINDS or not 1 <= head[3] <= 4:
        raise ValueError(f"{path} is no idx file: it starts with {head!r}")
    dims = read(4 * head[3])
    if len(dims) < 4 * head[3]:
        raise ValueError(f"{path} ends inside its header")
    shape = tuple(int.from_bytes(dims[i : i + 4], "big") for i in range(0, len(dims), 4))
    dtype = np.dtype(_IDX_KINDS[head[2]])
    declared = math.prod(shape) * dtype.itemsize
    if declared > limit:
        raise ValueError(f"{path} declares {shape} = {declared} bytes, at most {limit} are read")
    data = read(declared + 1)
    if len(data) != declared:
        more = "more than " if len(data) > declared else ""
        present = min(len(data), declared)
        raise ValueError(f"{path} declares {shape} = {declared} bytes and has {more}{present}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _slice(raw: bytes) -> Callable[[int], bytes]:
    at = 0

    def read(count: int) -> bytes:
        nonlocal at
        piece = raw[at : at + count]
        at += len(piece)
        return piece

    return read


def _gunzip(raw: bytes, path: Path) -> Callable[[int], bytes]:
    """A reader that inflates only what is asked for: a small file may otherwise unfold without end."""
    inflater = zlib.decompressobj(wbits=31)
    rest = raw

    def read(count: int) -> bytes:
        nonlocal rest
        out = b""
        while len(out) < count and not inflater.eof:
            try:
                piece = inflater.decompress(rest, count - len(out))
            except zlib.error as error:
                raise ValueError(f"{path} is damaged gzip data: {error}") from error
            rest = inflater.unconsumed_tail
            if not piece and not rest:
                break
            out += piece
        return out

    return read


def _write(
    args: argparse.Namespace, labels: np.ndarray | None, classes: list[str], members: Callable[[int], dict]
) -> None:
    """Write all samples, or two stratified parts, in one atomic step."""
    count = args.count
    if args.split_fraction is None:
        parts = {"": np.arange(count)}
    else:
        of = np.zeros(count, dtype=np.int64) if labels is None else labels
        first, second = stratified_split(of, args.split_fraction, args.seed)
        parts = {"train": first, "heldout": second}
        if not len(first) or not len(second):
            raise ValueError(f"--split-fraction {args.split_fraction} of {count} samples leaves a part empty")
    marker = f"{list(parts)[-1]}/{INDEX_NAME}".lstrip("/")
    with publishing_folder(args.output, marker) as folder:
        for split, part in parts.items():
            meta = {"name": split or args.kind, "num_classes": len(classes), "class_names": classes}
            part, mixing = writing_order(part, args.order, args.seed, split)
            meta |= mixing
            with ShardWriter(folder / split, args.shard_size, args.kind, meta) as writer:
                for index in part:
                    writer.add(f"{args.kind}-{index:08d}", members(int(index)))


def _run_digits(args: argparse.Namespace) -> None:
    from zigflow.datasets.digits import write_digits  # pyright: ignore[reportMissingImports]

    if args.seed:
        raise ValueError("the digits have one split, --seed does not apply")
    fraction = 0.5 if args.split_fraction is None else args.split_fraction
    write_digits(args.output, fraction, args.shard_size, args.order)


def _run_folder(args: argparse.Namespace) -> None:
    from PIL import Image

    from zigflow.datasets.image_folder import list_images  # pyright: ignore[reportMissingImports]

    background = WHITE if args.background is None else background_color(args.background)
    if args.background is not None and not args.resize:
        raise ValueError(
            "--background needs --resize: without it files are kept as they are, and data.source.background of a run "
            "counts"
        )
    files, labels, classes, _ = list_images(args.input)
    args.count = len(files)
    args.sizes, args.enlarged = set(), []

    def members(index: int) -> dict[str, bytes]:
        path = args.input / files[index]
        data, image = read_image(path, background=background)
        if args.resize:
            if min(image.shape[:2]) < args.resize:
                args.enlarged.append(path)
            image = np.array(CROPS[args.crop](Image.fromarray(image), args.resize))
            out = {"image.png": encode_png(image)}
        else:
            args.sizes.add(image.shape[:2])
            out = {f"image.{_MEMBERS.get(suffix := path.suffix.lower()[1:], suffix)}": data}
        return {**out, "cls_id.cls": str(labels[index]).encode()} if classes else out

    _write(args, np.asarray(labels) if classes else None, list(classes), members)


def _run_idx(args: argparse.Namespace) -> None:
    images = read_idx(args.input)
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{args.input} holds {images.dtype} {images.shape}, images are uint8 (n, height, width)"
        )
    labels = None
    if args.labels is not None:
        labels = read_idx(args.labels)
        if labels.ndim != 1 or labels.dtype != np.uint8 or len(labels) != len(images):
            raise ValueError(
                f"{args.labels} holds {labels.dtype} {labels.shape}, {len(images)} uint8 labels are needed"
            )
        labels = labels.astype(np.int64)
    args.count = len(images)
    classes = [] if labels is None else [str(n) for n in range(int(labels.max(initial=0)) + 1)]

    def members(index: int) -> dict[str, bytes]:
        out = {"image.png": encode_png(images[index])}
        return out if labels is None else {**out, "cls_id.cls": str(labels[index]).encode()}

    _write(args, labels, classes, members)


def _run_latent_features(args: argparse.Namespace) -> None:
    from zigflow.datasets.latent_features import LatentFeaturesSource  # pyright: ignore[reportMissingImports]

    source = LatentFeaturesSource(args.input, args.num_classes)
    args.count = len(source)
    labels = None
    if args.num_classes > 0 and args.split_fraction is not None:
        labels = np.array([source[index]["labels"] for index in range(len(source))])

    def members(index: int) -> dict[str, bytes]:
        sample = source[index]
        out = {"moments.npy": encode_npy(sample["moments"].numpy())}
        return {**out, "cls_id.cls": str(sample["labels"]).encode()} if "labels" in sample else out

    _write(args, labels, [str(n) for n in range(source.num_classes)], members)


def _run_coco_features(args: argparse.Namespace) -> None:
    from zigflow.datasets.coco_features import EMPTY, SPLITS, CocoFeaturesSource  # pyright: ignore[reportMissingImports]

    if args.split_fraction is not None:
        raise ValueError("the COCO features come in two parts, train and val: leave out --split-fraction")
    parts = {name: split for name, split in zip(("train", "heldout"), SPLITS, strict=True)
             if (args.input / split).is_dir()}  # fmt: skip
    if not parts:
        raise NotADirectoryError(f"{args.input} holds neither {' nor '.join(SPLITS)}")
    with publishing_folder(args.output, f"{list(parts)[-1]}/{INDEX_NAME}") as folder:
        for name, split in parts.items():
            source = CocoFeaturesSource(args.input, split)
            part, mixing = writing_order(np.arange(len(source)), args.order, args.seed, name)
            meta = {"name": f"coco/{split}", **mixing}
            with ShardWriter(folder / name, args.shard_size, "coco", meta) as writer:
                for index in map(int, part):
                    sample = source[index]
                    fields = {"moments.npy": sample["moments"], "caption_feature.npy": sample["tokens"]}
                    writer.add(f"{split}-{index:08d}", {k: encode_npy(v.numpy()) for k, v in fields.items()})
            np.save(folder / EMPTY, source.empty_context.numpy())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zigflow.tools make-shards", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, run, text in _kinds():
        sub = kinds.add_parser(name, help=text)
        sub.set_defaults(run=run, count=0)
        sub.add_argument("--output", type=Path, required=True, help="an empty or new folder")
        sub.add_argument("--shard-size", type=int, default=1000, help="samples per shard (1000)")
        sub.add_argument("--split-fraction", type=float, help="part of every class for training")
        sub.add_argument("--seed", type=int, default=0, help="seed of the split and of the order (0)")
        order = "given" if name == "digits" else "mixed"
        sub.add_argument(
            "--order", choices=ORDERS, default=order,
            help=f"mixed, keyed by --seed, or as given: that of the input, folders sorted by path ({order})",
        )  # fmt: skip
        if name != "digits":
            sub.add_argument("--input", type=Path, required=True, help=_INPUTS[name])
        if name == "folder":
            sub.add_argument("--resize", type=int, help="crop to the center and resize to this many pixels")
            sub.add_argument(
                "--crop", choices=list(CROPS), default="cover", help="how --resize crops; adm: ADM and DiT's ImageNet, "
                "lanczos: U-ViT's COCO (cover)",
            )  # fmt: skip
            sub.add_argument(
                "--background",
                type=int,
                help="grey level that shows through transparent images, with --resize (255)",
            )
        if name == "latent-features":
            sub.add_argument(
                "--num-classes", type=int, default=1000, help="number of labels (1000), 0 to leave them out"
            )
        if name == "idx":
            sub.add_argument("--labels", type=Path, help="the idx file of the labels")
    return parser


def _kinds() -> Iterator[tuple[str, Callable[[argparse.Namespace], None], str]]:
    yield "digits", _run_digits, "scikit-learn's digits, half of every class for training"
    yield "folder", _run_folder, "PNG, JPEG, WebP, BMP, TIFF and AVIF files, one sub-folder per class"
    yield "idx", _run_idx, "idx files as MNIST and Fashion-MNIST come in, gzipped or not"
    yield (
        "latent-features",
        _run_latent_features,
        "U-ViT's or DiM's ImageNet features: moments of latents and labels",
    )
    yield (
        "coco-features",
        _run_coco_features,
        "U-ViT's COCO features: moments of latents and features of captions",
    )
