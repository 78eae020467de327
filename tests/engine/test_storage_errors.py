"""A full disk, a read-only directory, a failing disk at every operation: old checkpoints intact, one line of advice."""

import errno
import os

import pytest
import torch

from tests.engine.test_checkpoint import Crash
from tests.engine.toys import TinyModel, assert_same_bits, make_trainer, snapshot
from zigflow import files, plugins
from zigflow.engine import checkpoint
from zigflow.engine.lock import Lock
from zigflow.engine.log import MetricsFile
from zigflow.engine.run_dir import RunDir
from zigflow.files import StorageError

ERRORS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "raise the quota",
    errno.EROFS: "mount it writable",
    errno.EACCES: "right to write",
    errno.EIO: "check the disk",
}


class At:
    """Raises, or does what it is given, at the ``index``-th operation and, for a crash, at every one after it."""

    def __init__(self, index, error):
        self.index, self.error, self.calls, self.hit = index, error, 0, None

    def __call__(self, operation, path):
        self.calls += 1
        if self.calls - 1 == self.index or (self.hit and self.error is Crash):
            self.hit = self.hit or (operation, path)
            raise Crash if self.error is Crash else OSError(self.error, os.strerror(self.error), str(path))


def run(folder, steps=2, **changes):
    return make_trainer(folder, steps=steps, ckpt_every=1, keep_last=1, log_every=1, **changes)


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """Every operation of a run of two steps: opening, log lines, two saves, a deletion."""
    folder, seen = tmp_path_factory.mktemp("operations"), []
    torch.manual_seed(0)
    with files.observed(lambda operation, path: seen.append((operation, path.relative_to(folder)))):
        run(folder / "run").fit()
    return seen


def newest(folder):
    found = checkpoint.find_latest(folder) if folder.exists() else None
    if found is not None:
        checkpoint.verify(found.path)
    return 0 if found is None else found.step


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    torch.manual_seed(0)
    trainer = run(tmp_path_factory.mktemp("unbroken"), steps=4)
    trainer.fit()
    return snapshot(trainer)


def check_every_operation(tmp_path, operations, indices, error, unbroken):
    published = 0
    for index in indices:
        folder = tmp_path / str(index)
        torch.manual_seed(0)
        at = At(index, error)
        with files.observed(at), pytest.raises(Crash if error is Crash else StorageError) as raised:
            run(folder).fit()
        assert at.hit is not None
        if error is not Crash:
            line = plugins.explain(raised.value, "default")
            for part in (str(at.hit[1]), os.strerror(error), ERRORS[error]):
                assert part in line, line
            assert "\n" not in line
            if (folder / "checkpoints").is_dir():
                left = [path.name for path in (folder / "checkpoints").glob(".incomplete-*")]
                assert left == [], f"{operations[index]}: the disk is kept full by {left}"
        assert newest(folder) >= published, f"{operations[index]}: the checkpoint of step {published} is gone"
        published = newest(folder)
        again = run(folder, steps=4, model=TinyModel(seed=8 if published else 0))
        if not published:
            torch.manual_seed(0)
        again.fit()
        assert_same_bits(snapshot(again), unbroken)
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-0000004"]
    return published


@pytest.mark.slow
@pytest.mark.parametrize("error", [Crash, *ERRORS], ids=lambda e: errno.errorcode.get(e, "crash"))
def test_every_operation_of_a_run(tmp_path, operations, unbroken, error, record_property):
    record_property("operations", len(operations))
    # Enumerated for the crash; the errors take turns, each at a fifth of the operations.
    chosen = list(ERRORS).index(error) if error is not Crash else 0
    indices = range(chosen, len(operations), 1 if error is Crash else len(ERRORS))
    assert check_every_operation(tmp_path, operations, indices, error, unbroken) == 2


@pytest.mark.parametrize("error", [Crash, errno.ENOSPC], ids=["crash", "ENOSPC"])
def test_some_operations_of_a_run(tmp_path, operations, unbroken, error):
    assert {name for name, _ in operations} == set(files.OPERATIONS) - {"truncate"}
    check_every_operation(tmp_path, operations, range(3, len(operations), 37), error, unbroken)


def test_a_write_limit_of_the_system_is_one_line(tmp_path):
    """A real failure of the system, in a process of its own: files may not grow past 8 kB."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        import resource

        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
            file = files.DurableFile(tmp_path / "large")
            with file:
                file.write(bytes(20000))
        except StorageError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        line = pipe.read()
    os.waitpid(child, 0)
    assert f"write of {tmp_path}/large failed: File too large; raise the limit on file sizes" in line


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for impossible in (tmp_path / "file" / "run", "/proc/no/run"):
        with pytest.raises(StorageError, match="mkdir of .* failed: "):
            RunDir(impossible).__enter__()


@pytest.mark.parametrize("step, kept", [(0, 0), (1, 1), (7, 7), (1000, 20)])
def test_rewinding_the_metrics_keeps_whole_lines(tmp_path, step, kept, monkeypatch):
    monkeypatch.setattr("zigflow.engine.log._BLOCK", 37)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(step)
    for number in range(1, 21):
        file.write({"step": number, "loss": 0.5, "text": "x" * (number * 5)})
    with open(file.path, "a") as stream:
        stream.write('{"step": 3, "lo')
    whole = file.path.read_bytes().splitlines(keepends=True)
    file.rewind(step)
    assert file.path.read_bytes() == b"".join(whole[:kept])
    file.rewind(step)
    assert file.path.read_bytes() == b"".join(whole[:kept])


def test_a_lock_that_cannot_be_written_is_named_and_let_go(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as disk,
        pytest.raises(StorageError, match=f"write of {tmp_path}/lock failed: No space"),
    ):
        disk.setattr(os, "pwrite", full)
        Lock(tmp_path)
    Lock(tmp_path).release()


def test_a_full_disk_is_one_line_whoever_wrote():
    """Pictures and archives are written by libraries whose errors name no file."""
    line = plugins.explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "sample")
    assert line is not None and line.startswith(
        "a file of results cannot be written: No space left on device; free"
    )
    assert plugins.explain(OSError(errno.EEXIST, "File exists"), "sample") is None
