"""results.json arrives whole, with its protocol, or not at all; sample ids count once."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from zigflow.metrics.base import SampleIds
from zigflow.metrics.results import PROTOCOL_KEYS, library_versions, read_results, write_results

PROTOCOL = dict.fromkeys(PROTOCOL_KEYS) | {
    "n": 500,
    "sampler": "dopri5",
    "versions": library_versions(),
    "command": ["sample_acc.py", "ckpt=run"],
}


def test_round_trip_with_sorted_keys_and_plain_numbers(tmp_path):
    path = tmp_path / "new" / "results.json"
    metrics = {
        "judge": {"passed": np.bool_(True), "b": np.float32(0.5), "a": torch.tensor(2)},
        "c": [1.5, "x"],
    }
    assert write_results(path, metrics, PROTOCOL) == path
    got, protocol = read_results(path)
    assert got == {"judge": {"passed": True, "b": 0.5, "a": 2}, "c": [1.5, "x"]}
    assert protocol == PROTOCOL
    text = path.read_text()
    assert text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    with pytest.raises(ValueError, match=r"metrics\.judge\.list\[1\]"):
        write_results(tmp_path / "r.json", {"judge": {"list": [0.0, bad]}}, PROTOCOL)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("key", PROTOCOL_KEYS)
def test_every_protocol_key_is_required(tmp_path, key):
    less = {k: v for k, v in PROTOCOL.items() if k != key}
    with pytest.raises(ValueError, match=key):
        write_results(tmp_path / "r.json", {"a": 1.0}, less)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, {"a": 1.0}, PROTOCOL)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_results(path, {"a": 2.0}, PROTOCOL)
    assert read_results(path)[0] == {"a": 1.0}
    assert os.listdir(tmp_path) == ["results.json"]


def test_bad_files_and_values_are_named(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(FileNotFoundError):
        read_results(path)
    for content, message in [("{", "no results file"), ("[]", "objects"), ('{"metrics": {}}', "protocol")]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_results(path)
    path.write_text('{"metrics": {}, "protocol": {}, "format_version": 99}')
    with pytest.raises(ValueError, match="format_version 99"):
        read_results(path)
    with pytest.raises(TypeError, match=r"metrics\.a: object"):
        write_results(path, {"a": object()}, PROTOCOL)
    with pytest.raises(TypeError, match="keys must be strings"):
        write_results(path, {"a": {1: 2.0}}, PROTOCOL)
    with pytest.raises(ValueError, match="no metric"):
        write_results(path, {}, PROTOCOL)


def test_ids_are_hashed_sorted_and_counted_once():
    one, two = SampleIds(), SampleIds()
    one.add(torch.tensor([5, 1]))
    one.add(np.array([3]))
    two.add(torch.tensor([3, 5, 1]))
    want = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (1, 3, 5))).hexdigest()
    assert one.sha256() == two.sha256() == want
    with pytest.raises(ValueError, match=r"id 1 \(and 1 more\)"):
        one.add(torch.tensor([9, 3, 1]))
    with pytest.raises(ValueError, match="id 9"):
        one.add(torch.tensor([9, 9]))
    assert len(one) == 3
    with pytest.raises(ValueError, match="int64"):
        one.add(torch.tensor([1.0]))
