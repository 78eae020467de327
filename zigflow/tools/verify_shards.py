"""``verify-shards``: check every byte, offset and sample of a folder of shards.

Exit code 0: all is well; 1: damage, each named by shard, offset and key.
"""

import argparse
import hashlib
from pathlib import Path

from zigflow.data.decode import DECODERS, DecodeError, decode
from zigflow.data.shard_index import INDEX_NAME, MEMBER_SUFFIX, Sample, Shard, load_samples, scan_shard
from zigflow.data.shards import ShardReader
from zigflow.data.tar import ShardError

_PIECE = 1 << 22


def main(argv: list[str]) -> int:
    """Run the command; 0 when nothing is wrong, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="zigflow.tools verify-shards", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of shards, or folders of such folders")
    parser.add_argument("--no-decode", action="store_true", help="check hashes and offsets only")
    parser.add_argument("--max-errors", type=int, default=20, help="stop after this many (20)")
    args = parser.parse_args(argv)
    found = 0
    for folder in _folders(args.folders):
        errors = verify_folder(folder, not args.no_decode, max(args.max_errors - found, 1))
        found += len(errors)
        for error in errors:
            print(f"DAMAGED {folder}: {error}")
        if found >= args.max_errors:
            print(f"stopped after {found} errors")
            break
    print(f"{found} errors" if found else "all shards are sound")
    return 1 if found else 0


def verify_folder(folder: Path, decode_members: bool = True, max_errors: int = 20) -> list[ShardError]:
    """Check one folder and print a line per shard; at most ``max_errors`` errors are returned."""
    errors: list[ShardError] = []
    try:
        reader = ShardReader(folder)
    except ShardError as error:
        return [error]
    for number, shard in enumerate(reader.index.shards):
        before = len(errors)
        members = _verify_shard(reader, number, shard, decode_members, max_errors, errors)
        if len(errors) == before:
            checked = (
                "hash, offsets and members" if shard.sha256 else "offsets and members (no hash is known)"
            )
            print(f"{folder / shard.name}: {shard.samples} samples, {members} members; {checked} are sound")
        if len(errors) >= max_errors:
            break
    return errors


def _verify_shard(
    reader: ShardReader,
    number: int,
    shard: Shard,
    decode_members: bool,
    max_errors: int,
    errors: list[ShardError],
) -> int:
    path, members = reader.root / shard.name, 0
    before = len(errors)
    try:
        listed = load_samples(reader.folder / (shard.name + MEMBER_SUFFIX), shard)
        _compare(listed, scan_shard(path), shard.name)
    except ShardError as error:
        errors.append(error)
    for member in range(shard.samples):
        if len(errors) >= max_errors:
            return members
        try:
            _, data = reader.read(number, member)
            for suffix, value in data.items():
                members += 1
                if decode_members and suffix.rsplit(".", 1)[-1] in DECODERS:
                    try:
                        decode(suffix, value)
                    except DecodeError as error:
                        errors.append(reader.error(number, member, suffix, str(error)))
        except ShardError as error:
            errors.append(error)
            if not error.key:
                return members
    # The members that are damaged say more than the hash of the whole: it is the last thing to report.
    if shard.sha256 is not None and len(errors) == before and _sha256(path) != shard.sha256:
        errors.append(ShardError("the tar does not have the hash of its index", shard.name))
    return members


def _compare(listed: list[Sample], scanned: list[Sample], name: str) -> None:
    """The tar's headers must place every member where the index does."""
    for ours, theirs in zip(listed, scanned, strict=False):
        places = [[(e.suffix, e.offset, e.size) for e in sample.entries] for sample in (ours, theirs)]
        if ours.key != theirs.key or places[0] != places[1]:
            raise ShardError(
                f"the index lists {ours.key!r} {places[0]}, the tar has {theirs.key!r} {places[1]}",
                name,
                theirs.entries[0].offset,
                ours.key,
            )
    if len(listed) != len(scanned):
        raise ShardError(f"the index lists {len(listed)} samples, the tar has {len(scanned)}", name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _folders(given: list[Path]) -> list[Path]:
    out: list[Path] = []
    for folder in given:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        holds = (folder / INDEX_NAME).is_file() or any(folder.glob("*.tar"))
        inner = [] if holds else sorted({path.parent for path in folder.rglob("*.tar")})
        if not holds and not inner:
            raise FileNotFoundError(f"{folder} holds no shards")
        out += inner or [folder]
    return out
