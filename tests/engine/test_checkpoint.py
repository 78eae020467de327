"""A save that is cut at any operation leaves a checkpoint that loads; damage is found; nothing is pickled."""

import json
import pickletools

import pytest
import torch

from tests.engine.evaluation_toys import on_threads
from zigflow import files
from zigflow.engine import checkpoint
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.ranks import Ranks
from zigflow.engine.tensors import load_tensors, save_tensors
from zigflow.errors import OtherRankError

RANKS = Ranks()


class Crash(BaseException):
    """The end of the process, which no handler sees."""


def write(directory, step, value=None):
    value = step if value is None else value
    shared = {
        "model.safetensors": {"w": torch.full((5,), float(value)), "empty": torch.zeros(0, 3)},
        "optimizer.safetensors": {"step/w": torch.tensor(float(value))},
        "trainer.json": {"step": step},
    }
    own = {"rank_0000.safetensors": {"cpu": torch.arange(9, dtype=torch.uint8)}}
    return checkpoint.save(directory, step, shared=shared, own=own, ranks=RANKS)


def save_and_prune(directory, step):
    write(directory, step)
    checkpoint.prune(directory, keep_last=2)


def value_of(found):
    checkpoint.verify(found.path)
    return found.tensors("model")["w"][0].item()


def start_again(directory):
    checkpoint.clean(directory)
    names = [path.name for path in directory.iterdir()]
    assert all(name.startswith("step-") for name in names), names
    return checkpoint.find_latest(directory)


def operations_of(directory, step):
    seen = []
    with files.observed(lambda operation, path: seen.append((operation, path.name))):
        save_and_prune(directory, step)
    return seen


@pytest.fixture
def directory(tmp_path):
    for step in (10, 20):
        write(tmp_path, step)
    return tmp_path


def crash_at(index):
    """An observer after whose ``index``-th operation the process does nothing any more."""
    seen = iter(range(10**6))

    def observer(operation, path):
        if next(seen) >= index:
            raise Crash(f"{operation} {path.name}")

    return observer


def test_a_crash_at_every_operation_leaves_a_loadable_checkpoint(tmp_path_factory):
    def fresh():
        folder = tmp_path_factory.mktemp("checkpoints")
        for step in (10, 20):
            write(folder, step)
        return folder

    operations = operations_of(fresh(), 30)
    kinds = {operation for operation, _ in operations}
    wanted = set(files.OPERATIONS) - {"truncate"}
    assert kinds == wanted, "the save and prune under test must use every kind of operation"
    published = next(
        i for i, (op, name) in enumerate(operations) if op == "rename" and name == "step-0000030"
    )
    for index in range(len(operations)):
        folder = fresh()
        with files.observed(crash_at(index)), pytest.raises(Crash):
            save_and_prune(folder, 30)
        found = start_again(folder)
        assert found is not None, operations[index]
        assert value_of(found) == (30 if index > published else 20), operations[index]
        # The run goes on from there and its next saves work.
        save_and_prune(folder, 30)
        assert value_of(checkpoint.find_latest(folder)) == 30


def test_a_write_that_fails_keeps_the_old_checkpoint(directory):
    def disk_full(operation, path):
        if operation == "write" and path.name == "model.safetensors":
            raise OSError(28, "No space left on device")

    with files.observed(disk_full), pytest.raises(OSError, match="No space left"):
        save_and_prune(directory, 30)
    assert value_of(start_again(directory)) == 20


@pytest.mark.parametrize("again", [False, True], ids=["once", "for good"])
def test_a_save_that_fails_anywhere_leaves_nothing_of_itself(tmp_path_factory, again):
    """A full disk lets go of files but takes none: what a failed save has written must not stay to fill it."""

    class Full:
        def __init__(self, index):
            self.left = index

        def __call__(self, operation, path):
            self.left -= 1
            takes = operation in ("mkdir", "open", "write", "fsync", "fsync_dir", "rename")
            if self.left == -1 or (again and self.left < 0 and takes):
                raise OSError(28, "No space left on device", str(path))

    def fresh():
        folder = tmp_path_factory.mktemp("full")
        write(folder, 10)
        return folder

    folder, seen = fresh(), []
    with files.observed(lambda operation, path: seen.append((operation, path.name))):
        write(folder, 20)
    assert len(seen) > 15
    for index, (operation, name) in enumerate(seen):
        folder = fresh()
        with files.observed(Full(index)), pytest.raises(files.StorageError):
            write(folder, 20)
        # With its name a checkpoint is complete, though the name could not be synced.
        named = index > seen.index(("rename", "step-0000020"))
        left = ["step-0000010", *(["step-0000020"] if named else [])]
        assert sorted(path.name for path in folder.iterdir()) == left, (operation, name)
        write(folder, 20)
        assert value_of(checkpoint.find_latest(folder)) == 20


@pytest.mark.parametrize("full", [0, 1])
def test_whichever_process_fails_the_main_one_removes_what_all_have_written(directory, full):
    def save(ranks):
        own = {f"rank_{ranks.rank:04d}.safetensors": {"cpu": torch.zeros(9)}}
        checkpoint.save(directory, 30, shared={"trainer.json": {}}, own=own, ranks=ranks)

    def disk_full(operation, path):
        if operation == "fsync" and path.name == f"rank_{full:04d}.safetensors":
            raise OSError(28, "No space left on device", str(path))

    with files.observed(disk_full):
        found = on_threads(2, save)
    assert isinstance(found[full], files.StorageError)
    assert isinstance(found[1 - full], OtherRankError)
    assert sorted(path.name for path in directory.iterdir()) == ["step-0000010", "step-0000020"]


def test_what_cannot_be_removed_hides_no_error(directory):
    def read_only(operation, path):
        if operation in ("write", "unlink", "rmdir"):
            raise OSError(30, "Read-only file system", str(path))

    with (
        files.observed(read_only),
        pytest.raises(files.StorageError, match="write of .* failed: Read-only"),
    ):
        write(directory, 30)
    assert value_of(start_again(directory)) == 20


def test_every_file_is_synced_before_the_seal_and_the_seal_before_the_name(tmp_path):
    operations = operations_of(tmp_path, 1)
    first = {entry: i for i, entry in reversed(list(enumerate(operations)))}
    last_data = max(i for i, (op, name) in enumerate(operations) if op == "fsync" and name != checkpoint.SEAL)
    rename = first[("rename", "step-0000001")]
    assert last_data < first[("open", checkpoint.SEAL)] < first[("fsync", checkpoint.SEAL)] < rename
    between = operations[last_data : first[("open", checkpoint.SEAL)]]
    assert ("fsync_dir", ".incomplete-step-0000001") in between, "names must be durable before the seal"
    assert operations[rename + 1] == ("fsync_dir", tmp_path.name)


def test_incomplete_directories_are_ignored(directory):
    (directory / "step-0000020" / checkpoint.SEAL).write_text("{")
    (directory / "step-0000099").mkdir()
    assert value_of(checkpoint.find_latest(directory)) == 10
    sealed = directory / "step-0000010" / "model.safetensors"
    sealed.write_bytes(sealed.read_bytes()[:-1])
    assert checkpoint.find_latest(directory) is None


def test_a_broken_directory_of_the_same_step_is_replaced(directory):
    (directory / "step-0000020" / checkpoint.SEAL).unlink()
    write(directory, 20, value=21)
    assert value_of(checkpoint.find_latest(directory)) == 21


def test_a_complete_checkpoint_of_the_same_step_stays(directory):
    write(directory, 20, value=21)
    assert value_of(checkpoint.find_latest(directory)) == 20


@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer.json", "rank_0000.safetensors", "optimizer.safetensors"]
)
def test_a_flipped_bit_is_found(directory, name):
    file = directory / "step-0000020" / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.open_checkpoint(directory / "step-0000020")


def test_a_changed_seal_is_found(directory):
    file = directory / "step-0000020" / checkpoint.SEAL
    seal = json.loads(file.read_text())
    seal["files"]["model.safetensors"]["sha256"] = "0" * 64
    file.write_text(json.dumps(seal))
    with pytest.raises(CheckpointError, match="seal|SEAL"):
        checkpoint.verify(directory / "step-0000020")


def test_a_newer_format_is_refused_by_name(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="format version 1"):
        checkpoint.verify(directory / "step-0000020")


def test_open_checkpoint_says_what_there_is(directory):
    assert checkpoint.open_checkpoint(directory).step == 20
    assert checkpoint.open_checkpoint(str(directory / "step-0000010")).step == 10
    with pytest.raises(CheckpointError, match="step-0000010, step-0000020"):
        checkpoint.open_checkpoint(directory / "step-0000030")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.open_checkpoint(directory / "elsewhere")


def test_prune_keeps_the_newest_and_those_on_the_list(directory):
    for step in (30, 40):
        write(directory, step)
    checkpoint.prune(directory, keep_last=2, keep={10})
    assert [c.step for c in checkpoint.list_complete(directory)] == [10, 30, 40]


def test_prune_deletes_nothing_when_the_newest_is_damaged(directory):
    write(directory, 30)
    file = directory / "step-0000030" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    checkpoint.prune(directory, keep_last=1)
    assert [c.step for c in checkpoint.list_complete(directory)] == [10, 20, 30]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pt"):
        checkpoint.save(tmp_path, 1, shared={"model.pt": {}}, own={}, ranks=RANKS)


def test_a_link_in_an_incomplete_directory_is_removed_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    inside = tmp_path / "checkpoints" / ".incomplete-step-0000001"
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    checkpoint.clean(tmp_path / "checkpoints")
    assert (outside / "keep").exists()
    assert not inside.exists()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_tensors_come_back_bit_by_bit(tmp_path, dtype):
    values = (torch.randn(3, 5) * 3).to(dtype)
    tensors = {
        "a": values,
        "b.c": values[:, ::2],
        "zero": values[0, 0],
        "none": values[:0],
        "u": torch.ones(3, dtype=torch.uint8),
    }
    entry = save_tensors(tmp_path / "x.safetensors", tensors, {"note": "é"})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert entry["size"] == len(data)
    assert entry["sha256"] == files.file_digest(tmp_path / "x.safetensors")
    back = load_tensors(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\x04 not this")
    with pytest.raises(ValueError, match="not a valid safetensors"):
        load_tensors(file)


def assert_nothing_pickled(folder):
    for file in folder.rglob("*"):
        if file.is_dir():
            continue
        data = file.read_bytes()
        assert not data.startswith((b"PK", b"\x80")), file
        if file.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            ends = [entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry]
            # No byte outside header and tensors, where a pickle could hide.
            assert 8 + length + max(ends, default=0) == len(data), file
        else:
            assert file.suffix in (".json", ".jsonl") or file.name == "lock", file
            with pytest.raises(Exception):
                list(pickletools.genops(data))
            if file.suffix == ".json":
                json.loads(data)


def test_no_pickle_in_a_checkpoint(directory):
    assert_nothing_pickled(directory)
