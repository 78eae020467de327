"""A configuration that asks for what its data does not hold is refused with the key to change; the rest follows."""

import itertools
import json
import logging
import shlex
from typing import ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.codec import IdentityCodec
from zigflow.data.class_names import by_name
from zigflow.data.writer import encode_png
from zigflow.engine.checkpoint import open_checkpoint
from zigflow.engine.evaluation import Judge
from zigflow.engine.ranks import Ranks
from zigflow.metrics.base import StreamingMetric
from zigflow.real_sets import real_sets
from zigflow.sample_job import sample_from_config
from zigflow.settings import Settings, SettingsError
from zigflow.sources import as_continued, build_source, build_stream, class_names, settled, with_old_defaults
from zigflow.stored_config import complete_from_checkpoint
from zigflow.tools.evaluate import _classes_of
from zigflow.train_job import _check_heldout, train_from_config

from .data.test_facts import folder_of, shards_of

TINY = [
    "model.embed_dim=8", "model.depth=1", "metrics=none", "loop.progress=false", "loop.device=cpu",
    "data.train_steps=1", "data.batch_size=4", "data.num_workers=0",
]  # fmt: skip
HELDOUT = (
    "data.heldout={{_target_: zigflow.datasets.image_folder.ImageFolderSource, root: {}/{}, image_size: {}}}"
)
FOLDER = "data=image_folder data.source.root={0}/three data.image_size=8"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    folder_of(root / "three", ("ant", "bee", "cat"))
    folder_of(root / "two", ("ant", "cat"))
    folder_of(root / "other", ("ant", "dog"))
    folder_of(root / "large", ("ant",), size=(16, 16))
    folder_of(root / "wide", ("ant", "bee"), size=(8, 12))
    (root / "flat").mkdir()
    for index in range(6):
        (root / "flat" / f"{index}.png").write_bytes(encode_png(np.full((8, 8, 3), index, np.uint8)))
    shards_of(root / "json", lambda i: {"json": json.dumps({"label": i % 3}).encode()})
    shards_of(root / "txt", lambda i: {"txt": str(i % 3).encode()})
    shards_of(root / "cls", lambda i: {"cls": str(i % 3).encode()})
    names = {"num_classes": 3, "class_names": ["ant", "bee", "cat"]}
    shards_of(root / "named", lambda i: {"cls": str(i % 3).encode()}, meta=names)
    return root


def compose(sets, command, run_dir):
    overrides = [word.replace("{0}", str(sets)) for word in shlex.split(command)]
    return plugins.compose_config([*TINY, *overrides, f"run_dir={run_dir}"])


def plain_of(cfg):
    return OmegaConf.to_container(cfg, resolve=True)


REFUSED = {
    "more classes than folders": (
        f"{FOLDER} data.num_classes=10",
        r"3 classes \(ant, bee, cat\), data\.num_classes=10: set data\.num_classes=3$",
    ),
    "fewer classes": (
        f"{FOLDER} data.num_classes=2",
        r"\(ant, bee, cat\), data\.num_classes=2: set data\.num_classes=3$",
    ),
    "a model's own number": (
        f"{FOLDER} model=digits_dit model.num_classes=1000",
        r"3 classes .*, model\.num_classes=1000: set model\.num_classes=3$",
    ),
    "shards that say how many": (
        "data=shards data.source.root={0}/named data.num_classes=5",
        r"\(ant, bee, cat\), data\.num_classes=5: set data\.num_classes=3$",
    ),
    "no labels": (
        "data=image_folder data.source.root={0}/flat data.image_size=8",
        r"no labels .*digits_zigzag8 is conditioned on classes: set data\.num_classes=0",
    ),
    "no labels for ten classes": (
        "data=image_folder data.source.root={0}/flat data.image_size=8 data.num_classes=10",
        r"no labels .*data\.num_classes=10: set data\.num_classes=0",
    ),
    "labels in JSON": (
        "data=shards data.source.root={0}/json data.num_classes=3",
        r"also have json.*'data\.source\.rename=\{json\.label: labels\}'.*data\.num_classes=0",
    ),
    "labels in texts": (
        "data=shards data.source.root={0}/txt",
        r"fields pixels, captions.*'data\.source\.rename=\{txt: labels\}'.*data\.num_classes=0",
    ),
    "nobody says how many": (
        "data=shards data.source.root={0}/cls",
        r"nothing says how many classes: give data\.num_classes=N",
    ),
    "a label beyond the number": (
        "data=shards data.source.root={0}/cls data.num_classes=1",
        r"labels up to 2, and the number of classes is 1: set data\.num_classes=3 or more",
    ),
    "a number beyond the labels": (
        "data=shards data.source.root={0}/cls data.num_classes=5",
        r"no label above 2, and the number of classes is 5: set data\.num_classes=3$",
    ),
    "names beyond the labels": (
        "data=shards data.source.root={0}/json 'data.source.rename={json.label: labels}' data.class_names=[a,b,c,d]",
        r"no label above 2, and data\.class_names lists 4 names: give 3 names$",
    ),
    "fewer names than labels": (
        "data=shards data.source.root={0}/cls data.class_names=[a,b]",
        r"labels up to 2, and data\.class_names lists 2 names: give 3 names or more$",
    ),
    "without classes, for a model of them": (
        f"{FOLDER} data.num_classes=0 model=digits_dit model.num_classes=3",
        r"data\.num_classes=0 trains without classes.*set model\.num_classes=0",
    ),
    "names that are not there": (
        f"{FOLDER} data.class_names=[ant,bee,cat,dog]",
        r"data\.class_names lists dog.*it has ant, bee, cat",
    ),
    "names of another number": (f"{FOLDER} data.class_names=[ant,bee] data.num_classes=3", "2 names"),
    "a name twice": (f"{FOLDER} data.class_names=[ant,ant]", "ant more than once"),
    "enlarged images": (
        "data=shards data.source.root={0}/named data.image_size=16",
        r"8 x 8 pixels, image_size=16 would enlarge.*data\.image_size=8.*data\.source\.enlarge=true",
    ),
    "held-out classes": (
        f"{FOLDER} '{HELDOUT.format('{0}', 'other', 8)}'",
        r"\(heldout\) has classes that are not among the 3 known ones: dog; known: ant, bee, cat",
    ),
    "held-out names for a training set without": (
        "data=shards data.source.root={0}/cls data.num_classes=3 data.heldout.root={0}/named",
        r"\(heldout\) has 3 classes \(ant, bee, cat\).*training set have no names: give data\.class_names=",
    ),
    "streams that say how many": (
        "data=shards data.order=streaming data.source.root={0}/named data.num_classes=5 "
        "+data.source.stream.cache_dir={0}/c",
        r"\(ant, bee, cat\), data\.num_classes=5: set data\.num_classes=3$",
    ),
    "streams of other names": (
        "data=shards data.order=streaming data.source.root={0}/named data.class_names=[ant,bee,cow] "
        "+data.source.stream.cache_dir={0}/c",
        r"classes that are not among the 3 known ones: cat",
    ),
    "held-out size": (
        f"{FOLDER} '{HELDOUT.format('{0}', 'large', 16)}'",
        r"\(heldout\) has samples of shape \(3, 16, 16\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, sets, tmp_path):
    command, message = REFUSED[case]
    with pytest.raises(Exception, match=message) as error:
        train_from_config(compose(sets, command, tmp_path / "run"))
    line = plugins.explain(error.value, "default")
    assert line is not None and "\n" not in line
    assert not (tmp_path / "run" / "checkpoints").exists()


FOLLOWS = {
    FOLDER: (3, 3, 8, ["ant", "bee", "cat"]),
    f"{FOLDER} data.class_names=[cat,bee,ant]": (3, 3, 8, ["cat", "bee", "ant"]),
    f"{FOLDER} data.num_classes=0": (0, 0, 8, ["ant", "bee", "cat"]),
    "data=shards data.source.root={0}/named": (3, 3, 8, ["ant", "bee", "cat"]),
    "data=shards data.source.root={0}/named data.image_size=[8,4]": (3, 3, [8, 4], ["ant", "bee", "cat"]),
    "data=shards data.source.root={0}/json 'data.source.rename={json.label: labels}' data.num_classes=3": (3, 3, 8, []),
    "data=shards data.source.root={0}/txt 'data.source.rename={txt: labels}' data.class_names=[a,b,c]": (
        3, 3, 8, ["a", "b", "c"],
    ),
}  # fmt: skip


def test_streams_number_their_classes_by_the_names_of_their_index(sets, tmp_path):
    options = "data.order=streaming '+data.source.stream={cache_dir: {0}/c, shuffle_buffer: 0}'"
    for names in (("ant", "bee", "cat"), ("cat", "ant", "bee")):
        listed = f"data.class_names=[{','.join(names)}]" if names[0] == "cat" else ""
        command = f"data=shards data.source.root={{0}}/named {options} {listed}"
        settings = Settings.from_mapping(plain_of(compose(sets, command, tmp_path / "run")))
        stream = build_stream(settings, settings.data.source)
        assert class_names(settings) == stream.class_names == names and stream.num_classes == 3
        samples = itertools.islice(stream.samples(0, 1, 0, 0), 6)
        called = {sample["key"]: names[sample["labels"]] for sample in samples}
        assert called == {f"{i:04d}": ("ant", "bee", "cat")[i % 3] for i in range(6)}


def test_classes_that_are_called_by_their_numbers_can_be_named(tmp_path):
    names = [f"digit-{n}" for n in range(10)]
    plain = plain_of(plugins.compose_config([f"run_dir={tmp_path}"]))
    plain["data"]["class_names"] = names
    assert settled(plain, Digits(), IdentityCodec())["data"]["class_names"] == names
    assert by_name(Digits(), names).class_names == Digits.class_names
    plain["data"]["class_names"] = names[:9]
    with pytest.raises(SettingsError, match="lists digit-0, .* does not have"):
        settled(plain, Digits(), IdentityCodec())


def test_labels_of_a_large_set_are_looked_at_in_part(sets, monkeypatch, tmp_path, caplog):
    plain = plain_of(
        compose(sets, "data=shards data.source.root={0}/cls data.num_classes=1000", tmp_path / "run")
    )
    source = build_source(Settings.from_mapping(plain))
    assert source.highest_label() == (2, 6)
    monkeypatch.setattr(source, "highest_label", lambda: source.__class__.highest_label(source, 4))
    settled(plain, source, IdentityCodec())
    assert "none of 4 labels is above" in caplog.text
    # Six samples cannot hold a thousand classes: a trial of a published set, not a wrong number.
    caplog.clear()
    monkeypatch.setattr(source, "highest_label", lambda: (2, 6))
    settled(plain, source, IdentityCodec())
    assert "none of 6 labels is above 2" in caplog.text
    monkeypatch.setattr(source, "highest_label", lambda: (990, 4))
    caplog.clear()
    settled(plain, source, IdentityCodec())
    assert "above" not in caplog.text


def test_a_run_that_continues_keeps_the_names_of_its_classes(sets, tmp_path):
    command = "data=shards data.source.root={0}/cls data.class_names=[a,b,c]"
    plain = plain_of(compose(sets, command, tmp_path / "run"))
    source = build_source(Settings.from_mapping(plain))
    stored = settled(plain, source, IdentityCodec())
    assert settled(plain, source, IdentityCodec(), stored) == stored
    plain["data"]["class_names"] = ["c", "b", "a"]
    with pytest.raises(SettingsError, match=r"data\.class_names=c, b, a, .* trained with a, b, c: drop"):
        settled(plain, source, IdentityCodec(), stored)


def test_numbers_as_names_are_texts(tmp_path, caplog):
    folder_of(tmp_path / "set", ("1", "2", "10"))
    command = "data=image_folder data.source.root={0}/set data.image_size=8 data.class_names="
    train_from_config(compose(tmp_path, command + "[10,2,1]", tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").config["data"]["class_names"] == ["10", "2", "1"]
    caplog.clear()
    by_number = sampled(tmp_path / "run", "labels=[1,0]")
    assert "1 is '2', 0 is '10'" in caplog.text and "names go in quotes" in caplog.text
    caplog.clear()
    assert sampled(tmp_path / "run", 'labels=["2","10"]') == by_number
    assert "names go in quotes" not in caplog.text
    with pytest.raises(SettingsError, match=r"not among the 3 known ones: 10; known: 1, 2, 3"):
        train_from_config(compose(tmp_path, command + "[1,2,3]", tmp_path / "other"))
    with pytest.raises(SettingsError, match="has True, the name of a class is a text"):
        plugins.plain(compose(tmp_path, command + "[1,2,true]", tmp_path / "other"))


@pytest.mark.parametrize("command", FOLLOWS)
def test_what_is_left_out_follows_from_the_data(command, sets, tmp_path):
    plain = plain_of(compose(sets, command, tmp_path / "run"))
    source = build_source(Settings.from_mapping(plain))
    found = settled(plain, source, IdentityCodec())
    classes, model_classes, size, names = FOLLOWS[command]
    assert (found["data"]["num_classes"], found["model"]["num_classes"]) == (classes, model_classes)
    assert found["data"]["image_size"] == found["model"]["img_dim"] == size
    assert found["data"]["class_names"] == names and found["model"]["in_channels"] == 3
    assert (found["model"]["class_dropout_prob"] > 0) == (classes > 0)
    Settings.from_mapping(found)


class Digits:
    image_shape, num_classes, class_names = (1, 8, 8), 10, tuple(str(n) for n in range(10))
    first: ClassVar = {"key": "0", "pixels": torch.zeros(1, 8, 8), "labels": 3}

    def __len__(self):
        return 899


def test_the_digits_are_trained_as_before(tmp_path):
    plain = plain_of(plugins.compose_config([f"run_dir={tmp_path}"]))
    found = settled(plain, Digits(), IdentityCodec())
    assert found["data"].pop("class_names") == [str(n) for n in range(10)]
    assert found == plain


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """A run on the classes ant, bee, cat of 8 x 12 pixels, with held-out images of two of them."""
    root = tmp_path_factory.mktemp("trained")
    for split, names in (("train", ("ant", "bee", "cat")), ("heldout", ("ant", "cat"))):
        folder_of(root / split, names, size=(8, 12))
    command = f"data=image_folder data.source.root={root}/train data.image_size=[8,12]"
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("zigflow.sources")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        cfg = compose(root, f"{command} '{HELDOUT.format(root, 'heldout', '[8,12]')}'", root / "run")
        train_from_config(cfg)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return root / "run", heard


def sampled(run, *overrides):
    cfg = plugins.compose_config(
        [f"ckpt={run}", f"run_dir={run}", "num_fid_samples=4", "offline_sample_local_bs=4", "loop.device=cpu",
         "ode.sampling_method=euler", "ode.num_steps=2", "loop.progress=false", *overrides],
        "sample",
    )  # fmt: skip
    return sample_from_config(cfg)


def test_a_run_says_what_it_found(trained):
    lines = trained[1]
    wanted = "data=image_folder: 6 samples, 3 x 8 x 12, 3 classes (ant, bee, cat), fields pixels, labels"
    assert wanted in lines
    assert any("(heldout): 4 samples" in line and line.endswith("no sample of bee") for line in lines)


def test_names_stand_in_checkpoint_and_results_and_choose_labels(trained):
    run, _ = trained
    stored = open_checkpoint(run).config
    assert stored["data"]["class_names"] == ["ant", "bee", "cat"] and stored["model"]["num_classes"] == 3
    assert stored["model"]["img_dim"] == [8, 12]
    folder = sampled(run, "labels=[cat,bee]", "npz=true")
    assert json.loads((folder / "results.json").read_text())["protocol"]["class_names"] == [
        "ant",
        "bee",
        "cat",
    ]
    assert np.load(next(folder.glob("*.npz")))["arr_1"].tolist() == [2, 1, 2, 1]
    # The same samples, whichever way they are asked for.
    assert sampled(run, "labels=[2,1]") == folder
    with pytest.raises(SettingsError, match=r"unknown class in labels 'cap'. Did you mean 'cat'"):
        sampled(run, "labels=cap")


def test_heldout_images_have_the_numbers_of_the_training_set(trained):
    run, _ = trained
    given = OmegaConf.to_container(
        plugins.compose_config([f"ckpt={run}", f"run_dir={run}"], "sample"), resolve=True
    )
    for key in ("weights", "seeds", "labels", "captions", "npz", "offline_sample_local_bs"):
        given.pop(key)
    settings = Settings.from_mapping(complete_from_checkpoint(given, open_checkpoint(run).config, "x"))
    heldout = build_source(settings, "heldout")
    numbers = {heldout[i]["key"].split("/")[0]: heldout[i]["labels"] for i in range(len(heldout))}
    assert numbers == {"ant": 0, "cat": 2} and heldout.num_classes == 3
    given["data"] = {**given["data"], "class_names": ["cat", "bee", "ant"]}
    with pytest.raises(SettingsError, match=r"data\.class_names=.*contradicts the checkpoint"):
        complete_from_checkpoint(given, open_checkpoint(run).config, "x")
    folder = sampled(run, "likelihood=1")
    assert json.loads((folder / "results.json").read_text())["protocol"]["n"] == 4


def test_a_run_that_starts_from_another_takes_its_classes_by_name(trained, tmp_path):
    run, _ = trained
    folder_of(tmp_path / "set", ("bee", "cat", "dog"), size=(8, 12))
    command = f"data=image_folder data.source.root={tmp_path}/set data.image_size=[8,12] ckpt={run}"
    train_from_config(compose(tmp_path, command, tmp_path / "run"))
    adapted = json.loads((tmp_path / "run/adapted.json").read_text())["adapted"]
    assert list(adapted.values()) == ["2 of 3 classes by their names; new: dog; left out: ant"]


def test_what_release_0_1_started_goes_on(sets, tmp_path, caplog):
    """More classes than folders, images that were enlarged, numbers sorted as text."""
    plain = plain_of(compose(sets, FOLDER, tmp_path / "run"))
    stored = json.loads(json.dumps(plain))
    del stored["data"]["class_names"], stored["data"]["source"]["enlarge"]
    stored["data"]["num_classes"] = stored["model"]["num_classes"] = 10
    stored["data"]["image_size"] = stored["data"]["source"]["image_size"] = stored["model"]["img_dim"] = 16
    plain["data"]["image_size"] = plain["data"]["source"]["image_size"] = plain["model"]["img_dim"] = None
    going_on = as_continued(plain, stored)
    assert (
        going_on["data"]["source"]["enlarge"] is True and going_on["data"]["source"]["class_order"] == "text"
    )
    source = build_source(Settings.from_mapping(going_on))
    assert source.image_shape == (3, 16, 16)
    found = settled(going_on, source, IdentityCodec(), stored)
    assert found["model"]["num_classes"] == 10 and "set data.num_classes=3" in caplog.text
    with pytest.raises(SettingsError, match="set data.num_classes=3"):
        settled(going_on, source, IdentityCodec())
    # A run of this release has said which of both it wants.
    new = {**stored["data"], "class_names": []}
    assert with_old_defaults(plain["data"], new)["source"] == plain["data"]["source"]


class Count(StreamingMetric):
    """Counts; reads the training images."""

    name, reference = "count", "train"

    def add_reference(self, images):
        pass

    reference_state = _state = lambda self: {}
    absorb_reference = _absorb = lambda self, state: None
    forget_reference = _forget = lambda self: None

    def compute(self):
        return {"count": self.count}

    def _take(self, images, labels, ids):
        pass


class Rounds:
    num_rounds = 1

    def __init__(self, side):
        self.side = side

    def round(self, number):
        return torch.zeros(2, 3, self.side, self.side, dtype=torch.uint8), torch.arange(2), None


@pytest.mark.parametrize("reduced", [1, 2])
def test_samples_of_another_size_than_the_real_images_are_refused(sets, tmp_path, reduced):
    source = build_source(Settings.from_mapping(plain_of(compose(sets, FOLDER, tmp_path))))
    judge = Judge(Count(), source, None, ranks=Ranks(), reduced=reduced)
    with pytest.raises(ValueError, match=r"5 x 5 pixels, the train images 8 x 8.*data\.image_size=5"):
        judge(Rounds(5 * reduced))
    with pytest.raises(ValueError, match="5 x 5 pixels"):
        judge.check(2, None, (5 * reduced, 5 * reduced))
    judge.check(2, None, (8 * reduced, 8 * reduced))
    assert judge(Rounds(8 * reduced)).metrics == {"count": 2}


def test_grey_samples_are_not_held_against_real_images_in_color(sets, tmp_path):
    source = build_source(Settings.from_mapping(plain_of(compose(sets, FOLDER, tmp_path))))

    class Grey(Rounds):
        def round(self, number):
            images, ids, labels = super().round(number)
            return images[:, :1], ids, labels

    with pytest.raises(ValueError, match=r"samples are grey, the train images in color.*data\.channels=1"):
        Judge(Count(), source, None, ranks=Ranks())(Grey(8))


def test_a_heldout_folder_that_does_not_exist_is_said(sets, tmp_path, caplog):
    missing = str(tmp_path / "nowhere")
    plain = plain_of(compose(sets, FOLDER, tmp_path))
    plain["data"]["heldout"] = {**plain["data"]["source"], "root": missing}
    _check_heldout(Settings.from_mapping(plain), None, None)
    assert f"data.heldout.root={missing} does not exist here" in caplog.text


def test_a_folder_without_a_size_is_refused_with_the_key(sets, tmp_path):
    plain = plain_of(compose(sets, FOLDER + " data.image_size=null", tmp_path))
    with pytest.raises(SettingsError, match=r"data\.image_size=N") as caught:
        build_source(Settings.from_mapping(plain))
    assert "\n" not in str(caught.value)


def test_videos_are_not_judged_as_images():
    given = ["data=synthetic", "data.video_frames=4", "data.sample_fid_every=1", "model=3d_zigzag8sst_b2"]
    for metric in ("fid", "digits"):
        plain = plain_of(plugins.compose_config([*given, f"metrics={metric}", "run_dir=unused"]))
        plain["metrics"]["reference_stats" if metric == "fid" else "seed"] = 1
        with pytest.raises(SettingsError, match=r"videos of 4 frames.*metrics=none"):
            real_sets(Settings.from_mapping(plain))


def test_stored_samples_number_the_real_images_by_their_names(sets, tmp_path):
    (tmp_path / "sampling.json").write_text('{"class_names": ["cat", "ant", "bee"]}')
    settings = Settings.from_mapping(plain_of(compose(sets, FOLDER, tmp_path)))
    named, names = _classes_of(settings, tmp_path)
    assert names == ["cat", "ant", "bee"]
    real = build_source(named)
    assert {real[i]["key"].split("/")[0]: real[i]["labels"] for i in range(6)} == {
        "cat": 0,
        "ant": 1,
        "bee": 2,
    }
    (tmp_path / "sampling.json").write_text('{"class_names": ["cat", "ant"]}')
    with pytest.raises(SettingsError, match="not among the 2 known ones: bee"):
        build_source(_classes_of(settings, tmp_path)[0])


def test_a_model_whose_size_follows_from_data_names_the_key(sets, tmp_path):
    from zigflow.build import build_model

    settings = Settings.from_mapping(plain_of(compose(sets, "data=shards", tmp_path)))
    with pytest.raises(SettingsError, match=r"give data\.(image_size|num_classes|channels)=VALUE"):
        build_model(settings)


def test_make_shards_says_which_classes_it_wrote(sets, tmp_path, capsys):
    from zigflow.tools.make_shards import main

    folder_of(tmp_path / "in", ("7", "12"))
    assert main(["folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "2 classes (7, 12)" in told and "7 is class 0" in told
