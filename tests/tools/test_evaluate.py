"""The evaluate command judges a folder as it judges the same images in an archive, and as the metric itself does."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from zigflow.codec import to_uint8
from zigflow.data.picture import read_image
from zigflow.datasets.digits import DigitsSource
from zigflow.metrics import stored_images
from zigflow.metrics.results import read_results
from zigflow.metrics.stored_images import StoredImages
from zigflow.tools.__main__ import main

FAST = ["metrics.fit_steps=2", "metrics.num_subsets=2"]
COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty held-out digits as if they were samples, with a sampling.json."""
    root = tmp_path_factory.mktemp("evaluate")
    source = DigitsSource(root=str(root / "digits"), split="heldout")
    by_label = {label: [i for i in range(len(source)) if source[i]["labels"] == label] for label in range(10)}
    images = np.stack([
        to_uint8(source[by_label[i % 10][i // 10]]["pixels"]).numpy() for i in range(COUNT)
    ])  # fmt: skip
    samples = root / "samples"
    samples.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(samples / f"{i:06d}.png")
    Image.new("RGB", (300, 200)).save(samples / "grid.png")
    (samples / "sampling.json").write_text(json.dumps({"num_classes": 10, "seed": 7, "precision": "no"}))
    np.savez(root / "samples.npz", arr_0=images.transpose(0, 2, 3, 1), arr_1=np.arange(COUNT) % 10)
    return root


def overrides(folder):
    roots = [f"data.{split}.root={folder / 'digits'}" for split in ("source", "heldout")]
    return [*roots, *(f"+{option}" for option in FAST)]


def test_a_folder_and_an_archive_of_the_same_images(folder, capsys):
    assert main(["evaluate", f"samples={folder / 'samples'}", *overrides(folder)]) == 0
    assert (
        main(
            [
                "evaluate",
                f"samples={folder / 'samples.npz'}",
                f"output={folder / 'b.json'}",
                *overrides(folder),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert str(folder / "samples" / "results.json") in out and "frechet_ratio" in out
    metrics, protocol = read_results(folder / "samples" / "results.json")
    again, other = read_results(folder / "b.json")
    assert metrics == again
    assert metrics["n"] == protocol["n"] == COUNT
    assert protocol["ids_sha256"] == other["ids_sha256"]
    assert (protocol["seed"], protocol["precision"], protocol["metric"]) == (7, "no", "digit_judge")
    assert other["seed"] is None, "an archive does not say how it was made"
    assert metrics["coverage"] > 0.5, "held-out images lie near held-out images"


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "samples=FOLDER"),
        (["samples=nowhere"], "nowhere is neither a folder nor an npz file"),
        (["samples={samples}", "metrics=none"], "metrics=NAME"),
        (["samples={samples}", "data=digit"], "did you mean"),
        (["samples={samples}", "metrics=fid"], "metrics.inception_weights=PATH"),
        (["samples={samples}", "metrics=fid", "metrics.inception_weights=none.pth"], "none.pth is no file"),
    ],
)
def test_mistakes_in_one_line(folder, capsys, arguments, part):
    given = [a.format(samples=folder / "samples") for a in arguments] or ["data=digits"]
    assert main(["evaluate", *given]) == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_images_that_do_not_belong_together(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no images"):
        StoredImages(tmp_path)
    for name, size in (("a", (4, 3)), ("b", (4, 3)), ("c", (5, 3))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    images = StoredImages(tmp_path, batch_size=2)
    first, ids, labels = images.round(0)
    assert (first.shape, ids.tolist(), labels, images.num_rounds) == ((2, 1, 3, 4), [0, 1], None, 2)
    with pytest.raises(ValueError, match=r"c\.png is \(1, 3, 5\)"):
        images.round(1)
    (tmp_path / "c.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"c\.png: not a readable image"):
        images.round(1)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 3, 4, 1)))
    with pytest.raises(ValueError, match="uint8 images"):
        StoredImages(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", arr_0=np.array([object()]))
    with pytest.raises(ValueError, match="plain arrays"):
        StoredImages(tmp_path / "b.npz")
    assert torch.equal(images.ids, torch.arange(3))


def test_transparent_samples_are_shown_on_the_background_of_the_real_set(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    for index in range(4):
        for part in ("real/a", "samples"):
            path = tmp_path / part / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(path)
    command = ["evaluate", f"samples={tmp_path / 'samples'}", "data=image_folder", "data.image_size=8",
               f"data.source.root={tmp_path / 'real'}", "metrics=none", "data.source.background=7"]  # fmt: skip
    assert main(command) == 1
    assert "nothing to judge with" in capsys.readouterr().err
    given = []

    def noted(*arguments, **options):
        given.append(options["background"])
        return read_image(*arguments, **options)

    monkeypatch.setattr(stored_images, "read_image", noted)
    assert main(command) == 1
    assert given == [(7, 7, 7)]
