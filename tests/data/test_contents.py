"""Sets are told apart by contents: replaced files of equal size are noticed, copied and touched ones are the same."""

import os
import shutil
import tarfile
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.engine.test_trainer import make_trainer
from zigflow.data.contents import contents_of, exact_fingerprint, keyed_sample
from zigflow.data.shard_index import load_folder_index, write_folder_index
from zigflow.data.subset import Subset
from zigflow.datasets.image_folder import ImageFolderSource
from zigflow.datasets.shards import ShardSource
from zigflow.engine.checkpoint import CheckpointError


def picture(level):
    stream = BytesIO()
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def pictures(root, count=12, level=0):
    for index in range(count):
        path = root / ("cat", "dog")[index % 2] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(level + index))
    return root


def tars(root, level=0, time=0):
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for index in range(6):
                for suffix, data in (("png", picture(level + index)), ("cls", b"1")):
                    info = tarfile.TarInfo(f"{shard}-{index}.{suffix}")
                    info.size, info.mtime = len(data), time
                    tar.addfile(info, BytesIO(data))
    return root


def touch(root):
    for path in sorted(root.rglob("*")):
        os.utime(path, ns=(10**18, 10**18 + 7))


KINDS = {
    "folder": (pictures, lambda root: ImageFolderSource(root, 4, channels=1)),
    "tars": (tars, lambda root: ShardSource(root, channels=1, num_classes=2)),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_is_noticed_and_copied_or_touched_is_the_same(kind, sampled, tmp_path, monkeypatch):
    if sampled:
        for module in ("contents", "indexing"):
            monkeypatch.setattr(f"zigflow.data.{module}._WHOLE", 60)
            monkeypatch.setattr(f"zigflow.data.{module}._PIECE", 30)
    make, source_of = KINDS[kind]
    first = source_of(make(tmp_path / "a"))
    assert (contents_of(first).times is not None) == sampled
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    touch(tmp_path / "b")
    copied = source_of(tmp_path / "b")
    assert copied.fingerprint == first.fingerprint
    # Results that are kept want more: the same contents, or the same times.
    assert (exact_fingerprint(copied) == exact_fingerprint(first)) == (not sampled)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").rglob("*.[pt]*"))]
    make(tmp_path / "a", level=100)
    touch(tmp_path / "a")
    assert [path.stat().st_size for path in sorted((tmp_path / "a").rglob("*.[pt]*"))] == sizes
    replaced = source_of(tmp_path / "a")
    assert replaced.fingerprint != first.fingerprint
    assert contents_of(replaced).former == contents_of(first).former, "0.1 did not notice"
    assert len({Subset(s, 3).fingerprint for s in (first, copied, replaced)}) == 2


def test_one_replaced_picture_of_few_is_noticed(tmp_path):
    before = ImageFolderSource(pictures(tmp_path), 4, channels=1).fingerprint
    (tmp_path / "dog" / "007.png").write_bytes(picture(200))
    os.utime(tmp_path / "dog" / "007.png", ns=(10**18, 10**18))
    assert ImageFolderSource(tmp_path, 4, channels=1).fingerprint != before


def test_tars_packed_anew_are_the_same(tmp_path):
    first = ShardSource(tars(tmp_path / "a"), channels=1, num_classes=2)
    again = ShardSource(tars(tmp_path / "b", time=12345), channels=1, num_classes=2)
    assert first.fingerprint == again.fingerprint
    # Also where the index lies in a cache, which is that of other tars meanwhile.
    cached = [
        ShardSource(tmp_path / n, channels=1, num_classes=2, cache_dir=tmp_path / "c") for n in ("a", "b")
    ]
    assert {s.fingerprint for s in cached} == {first.fingerprint}
    tars(tmp_path / "a", level=100)
    touch(tmp_path / "a")
    other = ShardSource(tmp_path / "a", channels=1, num_classes=2, cache_dir=tmp_path / "c")
    assert other.fingerprint != first.fingerprint


def test_an_index_of_the_first_release_is_completed(tmp_path):
    first = ShardSource(tars(tmp_path), channels=1, num_classes=2)
    index = load_folder_index(tmp_path)
    index.meta.pop("contents")
    write_folder_index(tmp_path, index)
    assert ShardSource(tmp_path, channels=1, num_classes=2).fingerprint == first.fingerprint
    assert "contents" in load_folder_index(tmp_path).meta


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_the_sample_is_spread_and_of_its_size(count, size):
    chosen = keyed_sample(count, size)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, size)
    assert min(chosen) >= 0 and max(chosen) < count
    assert max(np.diff(chosen), default=0) <= 2 * (count // size + 1)


def test_a_run_of_the_first_release_is_compared_once_as_it_was(tmp_path, caplog):
    order = {"order": {"seed": 0}}
    make_trainer(tmp_path, steps=1, data_identity={"fingerprint": "old", **order}).fit()
    now = {"fingerprint": "new", "former": "old", **order}
    with pytest.raises(CheckpointError, match="fingerprint was 'old', is 'new'"):
        make_trainer(tmp_path, steps=2, data_identity=now | {"former": "other"}).fit()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, steps=2, data_identity=now).fit()
    assert "names and sizes alone" in caplog.text
    with pytest.raises(CheckpointError, match="fingerprint was 'new', is 'newer'"):
        make_trainer(tmp_path, steps=3, data_identity=now | {"fingerprint": "newer"}).fit()


def test_times_alone_are_said_and_do_not_stop_a_run(tmp_path, caplog):
    def identity(times):
        return {"fingerprint": "a", "times": {"sha256": times, "hashed": 1024, "files": 5000}}

    make_trainer(tmp_path, steps=1, data_identity=identity("x")).fit()
    make_trainer(tmp_path, steps=2, data_identity=identity("x")).fit()
    assert "written or copied" not in caplog.text
    make_trainer(tmp_path, steps=3, data_identity=identity("y")).fit()
    assert "written or copied since" in caplog.text and "1024 of 5000" in caplog.text
