"""Hostile and damaged archives, and what the reader makes of them; run as a program it reports as JSON.

Every case is a folder of two tars: ``a.tar`` is good, ``b.tar`` holds the samples g0, bad, g1, g2.
"""

import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

BUDGET = 6


class Payload:
    def __reduce__(self):
        return os.system, ("touch owned",)


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_header(text, body=b""):
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + body


def declared(shape, body=bytes(16)):
    return npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", body)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, before=b"", rows=None):
    rows = bytes((width + 1) * height) if rows is None else rows
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def good(label=0, **changes):
    members = {
        "caption.json": b'["a", "b"]',
        "cls": str(label).encode(),
        "image.png": png(4, 4),
        "latent.npy": npy(np.full((1, 2, 2), label, np.float32)),
    }
    members.update({name.replace("_", "."): data for name, data in changes.items()})
    return {name: data for name, data in members.items() if data is not None}


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def sample(key, members):
    return b"".join(member(f"{key}.{suffix}", data) for suffix, data in members.items())


END = bytes(1024)
G0, G1, G2 = (sample(f"g{i}", good(i)) for i in range(3))
BAD = sample("bad", good())


def around(middle):
    """The good samples with ``middle`` between them."""
    return G0 + middle + G1 + G2 + END


def changed(**changes):
    return around(sample("bad", good(**changes)))


def with_extra(name, **fields):
    return around(BAD + member(name, **fields))


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("g0.cls", "0")
    return stream.getvalue()


def huge(path):
    """A member of 600 MB that takes no room on the disk."""
    size = 600 << 20
    info = tarfile.TarInfo("bad.latent.npy")
    info.size = size
    rest = sample("bad", {k: v for k, v in good().items() if k != "latent.npy"})
    with open(path, "wb") as file:
        file.write(G0 + rest + info.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, os.SEEK_CUR)
        file.write(G1 + G2 + END)


def many(path):
    path.write_bytes(around(b"".join(member(f"bad.s{i}") for i in range(20_000))))


def text_bomb(path):
    data = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(256 << 20)))
    path.write_bytes(changed(image_png=png(4, 4, before=data)))


def data_bomb(path):
    path.write_bytes(changed(image_png=png(4, 4, rows=bytes(256 << 20))))


DEEP = b"[" * 200_000 + b"]" * 200_000
WIDE = b"[" + b"[]," * 700_000 + b"[]]"
PAX = b"30 path=bad.cls\n".ljust(30, b"x")
LINK = {"linkname": "/etc/passwd"}

# name: (bytes of b.tar or a function that writes it, what the error says, which samples of b.tar survive a budget)
CASES = {
    "cut in a payload": (around(BAD)[: len(G0) + 700], "truncated", ["g0"]),
    "cut in a header": (around(BAD)[: len(G0) + 100], "truncated", ["g0"]),
    "cut at the end": ((G0 + BAD + G1 + G2), "closing blocks", ["g0", "bad", "g1", "g2"]),
    "flipped header": (flipped(around(BAD), len(G0) + 130), "wrong checksum", ["g0"]),
    "flipped payload": (changed(latent_npy=flipped(good()["latent.npy"], 30)), "npy", None),
    "flipped image": (changed(image_png=flipped(png(4, 4), 20)), "not a readable PNG", None),
    "interleaved": (around(BAD + G1[:1024] + member("bad.txt", b"x")), "interleaved", ["g0", "g2"]),
    "doubled member": (around(BAD + member("bad.CLS", b"1")), "two members 'cls'", None),
    "doubled key": (around(BAD + G0), "returns", ["bad", "g1", "g2"]),
    "missing member": (changed(latent_npy=None), "missing", None),
    "wrong shape": (changed(latent_npy=npy(np.zeros((1, 2, 3), np.float32))), "first sample has", None),
    "wrong image size": (changed(image_png=png(5, 4)), "first sample has", None),
    "wrong rank": (changed(latent_npy=npy(np.zeros(4, np.float32))), "dimensions", None),
    "not finite": (changed(latent_npy=npy(np.full((1, 2, 2), np.nan))), "not finite", None),
    "climbing name": (with_extra("../out.cls", data=b"0"), "climbs", ["g0", "bad", "g1", "g2"]),
    "absolute name": (with_extra("/tmp/out.cls", data=b"0"), "absolute", ["g0", "bad", "g1", "g2"]),
    "control characters": (with_extra("a\x1b[2J.cls", data=b"0"), "control", ["g0", "bad", "g1", "g2"]),
    "endless name": (with_extra("n" * 60_000 + ".cls", data=b"0"), "characters", ["g0", "bad", "g1", "g2"]),
    "symbolic link": (with_extra("bad.txt", type=tarfile.SYMTYPE, **LINK), "symbolic link", None),
    "hard link": (with_extra("bad.txt", type=tarfile.LNKTYPE, **LINK), "hard link", None),
    "device": (with_extra("bad.txt", type=tarfile.CHRTYPE), "character device", None),
    "pipe": (with_extra("bad.txt", type=tarfile.FIFOTYPE), "pipe", None),
    "sparse file": (with_extra("bad.txt", type=tarfile.GNUTYPE_SPARSE), "sparse", None),
    "unknown type": (with_extra("bad.txt", type=b"V"), "type b'V'", None),
    "declared size": (around(member("bad.cls", size=8 << 40)), "truncated", ["g0"]),
    "member of 600 MB": (huge, "budget of a member", None),
    "extended header bomb": (around(member("x", type=b"x", size=1 << 34)), "extended header", ["g0"]),
    "damaged extended header": (around(member("x", PAX, type=b"x") + BAD), "control", None),
    "npy declares 4 TB": (changed(latent_npy=declared("(1099511627776,)")), "budget", None),
    "npy of nothing": (changed(latent_npy=declared("(0, 9223372036854775808)", b"")), "npy", None),
    "npy of 65 axes": (changed(latent_npy=declared("(" + "1," * 65 + ")", bytes(4))), "npy", None),
    "npy of objects": (changed(latent_npy=npy(np.array([Payload()], object), allow_pickle=True)), "numbers", None),
    "npy header nested": (changed(latent_npy=npy_header("(" * 9000)), "npy", None),
    "npy header runs": (changed(latent_npy=npy_header("__import__('os').system('touch owned')")), "npy", None),
    "npy header of 1 MB": (changed(latent_npy=npy_header(" " * (1 << 20))), "header of", None),
    "pickle as npy": (changed(latent_npy=pickle.dumps(Payload())), "npy", None),
    "json too deep": (changed(caption_json=DEEP), "JSON|readable", None),
    "json too large": (changed(caption_json=WIDE), "bytes of text", None),
    "json of numbers": (changed(caption_json=b"9" * 100_000), "JSON", None),
    "captions of another kind": (changed(caption_json=b'{"a": 1}'), "list of texts", None),
    "endless class": (changed(cls=b"9" * 100_000), "a class is a number", None),
    "png of 10^10 pixels": (changed(image_png=png(100_000, 100_000, rows=b"")), "pixels|PNG", None),
    "png text bomb": (text_bomb, "PNG", None),
    "png data bomb": (data_bomb, None, ["g0", "bad", "g1", "g2"]),
    "concatenated": (around(BAD) + around(b""), "bytes follow", ["g0", "bad", "g1", "g2"]),
    "gzip": (zlib.compress(around(BAD), wbits=31), "no tar header|truncated", []),
    "zip": (zipped(), "no tar header|truncated", []),
    "empty file": (b"", "truncated", []),
    "only end blocks": (END, "no samples", []),
    "20,000 empty members": (many, "members of one key", None),
}  # fmt: skip


def survivors(name):
    kept = CASES[name][2]
    return ["g0", "g1", "g2"] if kept is None else kept


def build(name, folder):
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(b"".join(sample(f"a{i}", good(i)) for i in range(4)) + END)
    content = CASES[name][0]
    if callable(content):
        content(folder / "b.tar")
    else:
        (folder / "b.tar").write_bytes(content)
    return folder


def read_all(folder, max_skipped):
    """Keys of one epoch by id, and the messages of what was skipped."""
    from zigflow.data.global_batch import GlobalBatch
    from zigflow.data.loader import training_loader
    from zigflow.data.order import DataOrder
    from zigflow.datasets.shards import ShardSource

    source = ShardSource(folder, channels=1, max_skipped=max_skipped)
    order = DataOrder(source.shard_sizes, 0)
    loader = training_loader(source, order, GlobalBatch(1), stop_step=len(source), max_skipped=max_skipped)
    keys, messages = {}, [str(error) for error in source.reader.problems.errors]
    for batch in loader:
        keys[int(batch.ids)] = batch.keys[0]
        messages += batch.skipped
    return keys, messages


def report(name, folder):
    from zigflow.data.tar import ShardError

    out, started = {"error": None}, time.monotonic()
    try:
        read_all(folder, 0)
    except ShardError as error:
        out["error"] = str(error)
        out["place"] = [error.shard, error.offset, error.key]
    for path in folder.glob("*.json"):
        path.unlink()
    try:
        keys, out["skipped"] = read_all(folder, BUDGET)
        out["keys"] = sorted(set(keys.values()))
        out["again"] = read_all(folder, BUDGET)[0] == keys
    except ShardError as error:
        out["refused"] = str(error)
    out["seconds"] = time.monotonic() - started
    out["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def main(root):
    import logging

    from PIL import PngImagePlugin  # noqa: F401

    import zigflow.datasets.shards  # noqa: F401

    logging.disable(logging.CRITICAL)
    events = []
    watched = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "os.symlink",
               "os.link", "socket.connect", "os.fork", "exec")  # fmt: skip

    def audit(event, args):
        if event in watched:
            events.append(f"{event} {args!r:.200}")
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(os.path.realpath(root)):
                events.append(f"open {path}")

    read_all(Path(root) / "warm-up", BUDGET)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.addaudithook(audit)
    cases = {name: report(name, Path(root) / name.replace(" ", "-")) for name in CASES}
    print(json.dumps({"start": start, "events": events, "cases": cases}))


if __name__ == "__main__":
    main(sys.argv[1])
