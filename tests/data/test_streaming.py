"""Streams over a server that fails, truncates, stalls and redirects; the cache; the pipeline of several readers."""

import io
import os
import tarfile
import time

import numpy as np
import pytest
import torch

from tests.data.shard_server import serving
from zigflow.data import cache as caches
from zigflow.data.cache import FetchOptions, ShardCache
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.remote import scheme_of, shown, unsigned
from zigflow.data.shard_urls import shard_urls
from zigflow.data.streaming import StreamSource, check_readers, streaming_loader
from zigflow.data.tar import BudgetError, ShardError
from zigflow.data.writer import encode_npy
from zigflow.datasets.shards import ShardSource


def tar_bytes(samples):
    """samples: (key, {suffix: bytes})."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def latent(number, shape=(1, 2, 2)):
    return encode_npy(np.full(shape, number, np.float32))


def shard(number, count=6, **changes):
    rows = [
        (f"{number}-{i}", {"latent.npy": latent(number * 100 + i), "cls": str(i % 3).encode()})
        for i in range(count)
    ]
    for key, members in changes.items():
        rows = [(k, members if k == key.replace("_", "-") else m) for k, m in rows]
    return tar_bytes(rows)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as running:
        for number in range(6):
            running.files[f"/{number}.tar"] = shard(number)
        yield running


def source(server, tmp_path, root="{0..5}.tar", **options):
    options = {"backoff": 0.0, "timeout": 10.0, "cache_dir": tmp_path / "cache", **options}
    return StreamSource(f"{server.url}/{root}", **options)


def keys(loader, steps):
    batches = iter(loader)
    return [key for _ in range(steps) for key in next(batches).keys]


def test_one_pass_delivers_every_sample_once(server, tmp_path):
    stream = source(server, tmp_path, num_classes=3)
    assert (stream.image_shape, stream.num_classes) == ((1, 2, 2), 3)
    orders = []
    for buffer in (0, 5, 1000):
        samples = source(server, tmp_path, shuffle_buffer=buffer).samples(0, 1, seed=0, start=0)
        epochs = [[next(samples) for _ in range(36)] for _ in range(2)]
        orders += [[sample["key"] for sample in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 6
    for epoch in epochs:
        assert len({sample["key"] for sample in epoch}) == 36
        for sample in epoch:
            number, index = map(int, sample["key"].split("-"))
            assert sample["latents"].unique().tolist() == [number * 100 + index]
            assert sample["labels"] == index % 3


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 3)])
def test_ids_are_positions_and_readers_share_no_shard(server, tmp_path, workers, world, accum):
    if workers == 2 and world == 1 and accum == 1:
        pytest.importorskip("webdataset")
    stream = source(server, tmp_path, shuffle_buffer=8)
    seen, ids = [], []
    for rank in range(world):
        batch = GlobalBatch(6, world, rank, accum)
        mine = set()
        loader = streaming_loader(stream, batch, 0, start_step=5, stop_step=8, num_workers=workers)
        for number, found in enumerate(loader):
            step, micro = divmod(number, accum)
            assert found.ids.tolist() == list(batch.positions(5 + step, micro))
            ids += found.ids.tolist()
            mine |= {key.split("-")[0] for key in found.keys}
        seen.append(mine)
    assert sorted(ids) == list(range(30, 48))
    if world == 2:
        assert not seen[0] & seen[1]


def test_the_same_start_gives_the_same_samples_and_another_start_others(server, tmp_path):
    stream = source(server, tmp_path)

    def first(start, seed=0, workers=0):
        loader = streaming_loader(
            stream, GlobalBatch(8), seed, start_step=start, stop_step=start + 3, num_workers=workers
        )
        return [key for batch in loader for key in batch.keys]

    assert first(0) == first(0)
    assert first(0, workers=2) == first(0, workers=2)
    assert first(0) != first(1)
    assert first(0) != first(0, seed=1)


def test_the_resume_says_that_it_is_approximate(server, tmp_path, caplog):
    stream = source(server, tmp_path)
    assert stream.identity(3)["resume"] == "approximate"
    with caplog.at_level("WARNING"):
        streaming_loader(stream, GlobalBatch(2), 3, start_step=7)
    assert "resuming a stream at step 7 is approximate" in caplog.text


def test_fewer_shards_than_readers_are_refused_with_the_numbers(server, tmp_path):
    stream = source(server, tmp_path)
    check_readers(stream, 2, 3)
    with pytest.raises(
        ValueError, match=r"6 shards for 8 readers \(2 processes x 4 workers\).*num_workers to 3"
    ):
        streaming_loader(stream, GlobalBatch(8, 2), 0, num_workers=4)
    with pytest.raises(ValueError, match="at most 6 processes"):
        check_readers(stream, 7, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_readers_part_that_is_smaller_than_a_batch_ends_before_the_first_step(server, tmp_path, workers):
    stream = source(server, tmp_path)
    with pytest.raises(BudgetError, match="hold 36 readable samples, a batch takes 37"):
        next(iter(streaming_loader(stream, GlobalBatch(37), 0, num_workers=workers)))


FAULTS = {
    "server errors": [503, 500, 429],
    "resets": ["reset", "reset"],
    "stalls before the answer": ["stall"],
    "stalls within": [("stop", 700)],
    "truncations, continued": [("cut", 100), ("cut", 513), ("cut", 1), ("cut", 2000)],
    "redirects": ["to /1.tar", "to /2.tar"],
    "all of them": [("cut", 10), 502, "reset", ("stop", 99), "to /3.tar", ("cut", 7)],
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_what_a_server_does_wrong_is_tried_again(server, tmp_path, name):
    server.files["/3.tar"] = server.files["/2.tar"] = server.files["/1.tar"] = server.files["/0.tar"]
    server.faults["/0.tar"] = list(FAULTS[name])
    options = FetchOptions(tmp_path, timeout=2.0, backoff=0.0)
    fd = ShardCache(options).open(server.url + "/0.tar")
    assert os.read(fd, 1 << 20) == server.files["/0.tar"]
    os.close(fd)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"]


def test_a_cut_download_continues_and_does_not_begin_again(server, tmp_path):
    server.faults["/0.tar"] = [("cut", 1000), ("cut", 500)]
    os.close(ShardCache(FetchOptions(tmp_path, backoff=0.0)).open(server.url + "/0.tar"))
    assert [given for _, given in server.requests] == ["", "bytes=1000-", "bytes=1500-"]
    server.ranges = False
    server.faults["/1.tar"] = [("cut", 1000)]
    fd = ShardCache(FetchOptions(tmp_path, backoff=0.0)).open(server.url + "/1.tar")
    assert os.read(fd, 1 << 20) == server.files["/1.tar"], "a server without ranges sends the whole again"
    os.close(fd)


def test_contents_that_change_on_the_way_are_not_mixed(server, tmp_path, monkeypatch):
    server.faults["/0.tar"] = [("cut", 1000)]
    new = shard(9)
    real = time.sleep
    monkeypatch.setattr(caches.time, "sleep", lambda seconds: (server.files.update({"/0.tar": new}), real(0)))
    fd = ShardCache(FetchOptions(tmp_path)).open(server.url + "/0.tar")
    assert os.read(fd, 1 << 20) == new
    os.close(fd)


@pytest.mark.parametrize(
    "fault, options, match",
    [
        ([404], {}, "404"),
        ([403], {}, "403"),
        ([500] * 9, {"attempts": 3}, "500.*3 attempts in a row"),
        (["stall"] * 9, {"attempts": 2, "timeout": 0.2}, "2 attempts in a row"),
        ([("cut", 1)] * 999, {"deadline": 0.3}, "within stream.deadline"),
        (["to ftp://127.0.0.1/x"], {}, "redirect from http to ftp"),
        (["to file:///etc/passwd"], {}, "Redirection.*not allowed"),
        (["to /0.tar"] * 50, {"attempts": 2}, "redirect"),
        ([], {"max_shard_bytes": 1000}, "max_shard_bytes=1000"),
        ([], {"cache_bytes": 1000}, "stream.cache_bytes=1000"),
    ],
)
def test_what_cannot_be_fetched_is_an_error_that_names_the_shard(server, tmp_path, fault, options, match):
    server.faults["/0.tar"] = fault
    cache = ShardCache(FetchOptions(tmp_path, **{"timeout": 10.0, "backoff": 0.0, **options}))
    with pytest.raises(ShardError, match=match) as error:
        cache.open(server.url + "/0.tar?token=secret")
    assert error.value.shard == server.url + "/0.tar"
    assert "secret" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_length_that_lies_is_a_truncated_tar(server, tmp_path):
    server.faults["/0.tar"] = [("lie", 700)] * 2
    with pytest.raises(ShardError, match="it is truncated"):
        source(server, tmp_path, "0.tar")
    assert source(server, tmp_path, "0.tar").first["key"] == "0-0"


def test_an_answer_without_a_length_is_bounded_all_the_same(server, tmp_path):
    server.lengths = False
    fd = ShardCache(FetchOptions(tmp_path)).open(server.url + "/0.tar")
    assert os.fstat(fd).st_size == len(server.files["/0.tar"])
    os.close(fd)
    with pytest.raises(ShardError, match="more than 2000 bytes"):
        ShardCache(FetchOptions(tmp_path, max_shard_bytes=2000)).open(server.url + "/1.tar")


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(server, tmp_path):
    size = len(server.files["/0.tar"])
    cache = ShardCache(FetchOptions(tmp_path, cache_bytes=3 * size + 10))
    held = cache.open(f"{server.url}/0.tar")
    for number in (1, 2):
        os.close(cache.open(f"{server.url}/{number}.tar"))
    for stamp, number in enumerate((0, 1, 2)):
        os.utime(cache._path(f"{server.url}/{number}.tar"), ns=(stamp, stamp))
    os.close(cache.open(f"{server.url}/1.tar"))
    os.close(cache.open(f"{server.url}/3.tar"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size + 10
    left = {n for n in range(6) if cache._path(f"{server.url}/{n}.tar").exists()}
    assert left == {1, 2, 3}
    assert os.read(held, 1 << 20) == server.files["/0.tar"], "an open shard survives its eviction"
    os.close(held)
    before = len(server.requests)
    os.close(cache.open(f"{server.url}/1.tar"))
    assert len(server.requests) == before


def test_partial_files_of_dead_processes_go_and_those_of_living_ones_stay(server, tmp_path):
    (tmp_path / "dead.part").write_bytes(bytes(5000))
    size = len(server.files["/0.tar"])
    cache = ShardCache(FetchOptions(tmp_path, cache_bytes=2 * size))
    living, name = cache.reserve(size)
    os.close(cache.open(f"{server.url}/0.tar"))
    assert sorted(path.name for path in tmp_path.glob("*.part")) == [os.path.basename(name)]
    with pytest.raises(ShardError, match="others are fetching"):
        ShardCache(FetchOptions(tmp_path, cache_bytes=size + 1)).open(f"{server.url}/1.tar")
    living.close()


def test_a_damaged_copy_in_the_cache_is_fetched_once_more(server, tmp_path):
    stream = source(server, tmp_path, shuffle_buffer=0)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:3000])
    plain = stream.samples(0, 1, seed=0, start=0)
    assert len({next(plain)["key"] for _ in range(36)}) == 36


def test_problems_are_errors_by_default_and_counted_within_a_budget(server, tmp_path):
    server.files["/1.tar"] = server.files["/1.tar"][:3000]
    server.files["/2.tar"] = shard(2, **{"2_3": {"latent.npy": b"junk", "cls": b"0"}})
    del server.files["/4.tar"]
    for number, match in ((1, "truncated"), (2, "latent.npy: not a readable npy"), (4, "404")):
        with pytest.raises(ShardError, match=match) as error:
            strict = source(server, tmp_path, f"{{0,{number}}}.tar", shuffle_buffer=0)
            samples = strict.samples(0, 1, seed=0, start=0)
            for _ in range(12):
                next(samples)
        assert error.value.shard == f"{server.url}/{number}.tar"
    stream = source(server, tmp_path, shuffle_buffer=0, max_skipped=4)
    samples = stream.samples(0, 1, seed=0, start=0)
    epoch, after = [next(samples) for _ in range(24)], next(samples)
    messages = [message for sample in [*epoch, after] for message in sample.get("skipped", ())]
    assert len({sample["key"] for sample in epoch}) == 24
    assert any("key '2-3'" in message and "offset" in message for message in messages)
    assert any("truncated" in message for message in messages) and any("404" in m for m in messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_at_all_ends_instead_of_turning_for_ever(server, tmp_path, workers):
    stream = source(server, tmp_path, max_skipped=2)
    for path in (tmp_path / "cache").glob("*"):
        path.unlink()
    server.files.clear()
    with pytest.raises(BudgetError, match="3 problems in a row, data.max_skipped is 2.*404"):
        next(iter(streaming_loader(stream, GlobalBatch(2), 0, num_workers=workers)))


def test_commands_are_refused_and_run_without_a_shell_when_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in ("pipe:touch owned", ["pipe:touch owned"], "PIPE:touch owned", "exec:touch owned"):
        with pytest.raises(ValueError, match="command|URL scheme"):
            ShardSource.stream(root)
    (tmp_path / "a b.tar").write_bytes(shard(0))
    options = {"allow_pipe": True, "cache_dir": tmp_path / "cache", "attempts": 1, "timeout": 5}
    stream = StreamSource("pipe:cat 'a b.tar'", **options)
    assert stream.first["key"] == "0-0"
    for command in ("cat 'a b.tar'; touch owned", "cat 'a b.tar' > owned", "false", "no-such-command"):
        with pytest.raises(ShardError, match="command"):
            StreamSource(f"pipe:{command}", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.tar", "cache"]


def test_roots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.tar", "a.tar", "x.txt"):
        (tmp_path / name).write_bytes(b"")
    assert shard_urls(tmp_path) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert shard_urls("s{08..10}.tar::t.tar") == ["s08.tar", "s09.tar", "s10.tar", "t.tar"]
    assert shard_urls(["https://h/a.tar", "s3://bucket/b.tar"])[1] == "s3://bucket/b.tar"
    signed = "https://h/a.tar?X-Amz-Signature=secret&part=3"
    (tmp_path / "list.txt").write_text(f"# one per line\n{signed}\n\nhttps://h/b.tar\n")
    assert shard_urls("list.txt") == [signed, "https://h/b.tar"]
    with pytest.raises(ValueError, match=r"write signed URLs into a \.txt file") as error:
        shard_urls(signed)
    assert "secret" not in str(error.value)
    for bad in ("ftp://h/a.tar", "gopher:x", "https://user:secret@h/a.tar"):
        with pytest.raises(ValueError, match="URL scheme|password") as error:
            shard_urls(bad)
        assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="0 shards"):
        shard_urls([])


def test_signatures_are_no_part_of_a_name():
    url = "https://h/a.tar?X-Amz-Signature=1&X-Amz-Date=2&part=3&sig=4"
    assert unsigned(url) == "https://h/a.tar?part=3"
    assert shown(url) == "https://h/a.tar"
    assert [scheme_of(u) for u in ("a.tar", "/x/a.tar", "file:///a", "C:\\x", "s3://b/k", "pipe:x")] == [
        "file", "file", "file", "file", "s3", "pipe",
    ]  # fmt: skip


def test_s3_goes_through_s3fs_or_names_the_extra(tmp_path, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "s3fs", None)
    options = {"cache_dir": tmp_path / "c", "attempts": 4, "backoff": 0.0}
    with pytest.raises(ImportError, match=r"zigflow\[s3\]"):
        StreamSource("s3://bucket/0.tar", **options)
    data, cuts = shard(0), [700, 900]

    class Stand(io.BytesIO):
        """The part of s3fs that is used; it breaks twice on the way."""

        def read(self, size=-1):
            if cuts and self.tell() < cuts[0]:
                return super().read(min(size, cuts[0] - self.tell()))
            if cuts:
                cuts.pop(0)
                raise RuntimeError("connection lost")
            return super().read(size)

    class System:
        def info(self, url):
            if not url.endswith("0.tar"):
                raise FileNotFoundError(url)
            return {"size": len(data), "ETag": '"1"'}

        def open(self, url, mode):
            return Stand(data)

    monkeypatch.setitem(sys.modules, "s3fs", types.SimpleNamespace(S3FileSystem=System))
    stream = StreamSource("s3://bucket/0.tar", **options)
    assert torch.equal(stream.first["latents"], torch.zeros(1, 2, 2))
    assert not cuts
    with pytest.raises(ShardError, match="FileNotFoundError"):
        StreamSource("s3://bucket/1.tar", **options)


def test_without_the_library_the_extra_is_named(server, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"zigflow\[stream\]"):
        source(server, tmp_path)


def test_files_stay_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setattr("zigflow.data.streaming._OPEN_SHARDS", 2)
    samples = source(server, tmp_path).samples(0, 1, seed=0, start=0)
    stream = source(server, tmp_path, cache_bytes=2 * len(server.files["/0.tar"]) + 10)
    samples = stream.samples(0, 1, seed=0, start=0)
    assert len({next(samples)["key"] for _ in range(40)}) > 20, "what the cache lost is fetched again"
    assert len(stream._files) <= 2
