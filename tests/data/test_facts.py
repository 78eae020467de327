"""What a data set holds: facts, class names, labels in other members, sizes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zigflow.data.class_names import NamedClasses, by_name, folder_order, number_of, renumbered
from zigflow.data.facts import facts_of
from zigflow.data.json_fields import pick, split_suffix
from zigflow.data.subset import Subset
from zigflow.data.writer import ShardWriter, encode_png
from zigflow.datasets.image_folder import ImageFolderSource
from zigflow.datasets.shards import ShardSource
from zigflow.tools.make_shards import main as make_shards

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=3), unique=True, min_size=1, max_size=8)


def image(level, size=(8, 8)):
    return encode_png(np.full((*size, 3), level, np.uint8))


def folder_of(root, classes, each=2, size=(8, 8)):
    """PNG files whose grey level is their class's place in the alphabet."""
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(each):
            (folder / f"{index}.png").write_bytes(image((ord(name[0]) - 97) % 256, size))
    return root


def shards_of(root, members_of, samples=6, meta=None):
    with ShardWriter(root, meta=meta) as writer:
        for index in range(samples):
            writer.add(f"{index:04d}", {"png": image(index), **members_of(index)})
    return root


@given(NAMES, st.randoms())
def test_a_class_keeps_its_name_whatever_the_numbers_are(names, random):
    class Source:
        class_names, num_classes, shard_sizes, fingerprint, image_shape = (
            names,
            len(names),
            (len(names),),
            "a",
            (1,),
        )

        def __len__(self):
            return len(names)

        def __getitem__(self, index):
            return {"key": names[index], "labels": index}

    others = list(dict.fromkeys([*names, "extra"]))
    random.shuffle(others)
    numbered = by_name(Source(), others)
    for index, name in enumerate(names):
        assert others[numbered[index]["labels"]] == name == numbered[index]["key"]
    same = by_name(Source(), [*names, "extra"])
    assert same.fingerprint == "a" and same[len(names) - 1]["labels"] == len(names) - 1
    if numbered is not same and isinstance(numbered, NamedClasses):
        assert numbered.fingerprint != "a"


@given(st.integers(1, 200), st.booleans())
def test_folders_named_0_to_k_keep_their_number(count, padded):
    names = [f"{n:03d}" if padded else str(n) for n in range(count)]
    ordered = folder_order(reversed(names))
    assert ordered == names and not renumbered(ordered)


def test_other_numbers_are_told_and_texts_are_sorted_as_texts():
    assert folder_order(["10", "9", "ant"]) == ["10", "9", "ant"]
    assert renumbered(folder_order(["2003", "999"])) == [("999", 0), ("2003", 1)]


def test_a_class_is_called_by_number_or_name():
    assert number_of(2, ()) == 2 and number_of("bee", ("ant", "bee")) == 1
    with pytest.raises(ValueError, match="Did you mean 'bee'"):
        number_of("bea", ("ant", "bee"))
    with pytest.raises(ValueError, match="no names"):
        number_of("bee", ())


def test_one_line_about_a_folder_and_a_part_of_it(tmp_path):
    source = ImageFolderSource(folder_of(tmp_path, ("cat", "ant")), 8)
    line = facts_of(source, "data=image_folder").line()
    assert line == "data=image_folder: 4 samples, 3 x 8 x 8, 2 classes (ant, cat), fields pixels, labels"
    assert facts_of(Subset(source, 3), "x").line() == line.replace("data=image_folder: 4", "x: 3")


def test_suffixes_that_are_not_read_are_told(tmp_path):
    root = shards_of(tmp_path / "a", lambda i: {"json": b"{}", "npy": b"", "txt": b"a text"})
    facts = facts_of(ShardSource(root), "a")
    assert facts.ignored == ("json", "npy") and facts.num_classes == 0 and not facts.has_labels
    assert facts.line() == "a: 6 samples, 3 x 8 x 8, no labels, fields pixels, captions; ignored: json, npy"


def test_names_and_count_come_from_the_index(tmp_path):
    meta = {"num_classes": 2, "class_names": ["ant", "bee"]}
    root = shards_of(tmp_path / "a", lambda i: {"cls": str(i % 2).encode()}, meta=meta)
    facts = facts_of(ShardSource(root, num_classes=7), "a")
    assert (facts.num_classes, facts.class_names) == (2, ("ant", "bee"))
    unknown = shards_of(tmp_path / "b", lambda i: {"cls": b"1"})
    assert facts_of(ShardSource(unknown), "b").num_classes is None


LABELS = {
    "json": ("{json.about.Label: labels}", lambda i: {"json": json.dumps({"about": {"Label": i % 3}}).encode()}),
    "list": ("{json.0: labels}", lambda i: {"json": json.dumps([i % 3, "x"]).encode()}),
    "float": ("{json.label: labels}", lambda i: {"json": json.dumps({"label": float(i % 3)}).encode()}),
    "text": ("{txt: labels}", lambda i: {"txt": f"{i % 3}\n".encode()}),
    "name": ("{txt: labels}", lambda i: {"txt": ("ant", "bee", "cat")[i % 3].encode()}),
    "name in json": ("{json.label: labels}", lambda i: {"json": json.dumps({"label": "abc"[i % 3]}).encode()}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_json_and_texts(tmp_path, kind):
    typed, members = LABELS[kind]
    suffix = typed.strip("{}").partition(":")[0]
    names = ("a", "b", "c") if kind == "name in json" else ("ant", "bee", "cat")
    source = ShardSource(shards_of(tmp_path / "s", members), {suffix: "labels"}, class_names=names)
    assert [source[i]["labels"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert {"pixels", "labels"} <= set(source[0]) and not source.ignored


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"other": 1}', "no field label; it has other"),
        ('{"label": "dog"}', "unknown class 'dog'"),
        ('{"label": true}', "number or the name"),
        ('{"label": -1}', "number or the name"),
        ('{"label": 1.5}', "number or the name"),
        ('{"label": [1]}', "number or the name"),
        ("[1]", "no field label"),
        ("{", "not a readable JSON"),
    ],
)
def test_what_is_no_label_is_named(tmp_path, content, problem):
    root = shards_of(tmp_path / "s", lambda i: {"json": content.encode()})
    with pytest.raises(ValueError, match=problem) as error:
        ShardSource(root, {"json.label": "labels"}, class_names=("ant", "bee"))
    assert "json" in str(error.value) and "0000" in str(error.value)


def test_a_name_without_names_says_where_to_list_them(tmp_path):
    root = shards_of(tmp_path / "s", lambda i: {"txt": b"ant"})
    with pytest.raises(ValueError, match=r"data\.class_names"):
        ShardSource(root, {"txt": "labels"})


def test_where_labels_could_be_is_found(tmp_path):
    cases = {
        "a": ({"json": b'{"id": 3, "Class_id": 1}'}, "{json.Class_id: labels}"),
        "b": ({"json": b"4"}, "{json: labels}"),
        "c": ({"meta.json": b'{"label": "ant"}'}, "{meta.json.label: labels}"),
        "d": ({"json": b'{"id": 3}'}, ""),
        "e": ({"other.cls": b"1"}, "{other.cls: labels}"),
    }
    for name, (members, hint) in cases.items():
        assert ShardSource(shards_of(tmp_path / name, lambda i, m=members: m)).label_hint() == hint


def test_a_member_is_taken_before_a_field_of_another():
    assert split_suffix("json.label", ["json", "png"]) == ("json", ("label",))
    assert split_suffix("json.label", ["json.label", "json"]) == ("json.label", ())
    assert split_suffix("a.json.b.c", []) == ("a.json", ("b", "c"))
    assert pick({"b": [{"c": 5}]}, ("b", "0", "c")) == 5


def test_smaller_images_are_refused_unless_asked_for(tmp_path):
    root = folder_of(tmp_path / "f", ("ant",), each=3)
    (root / "ant" / "9.png").write_bytes(image(1, (20, 20)))
    with pytest.raises(
        ValueError, match=r"8 x 8 pixels, image_size=16 would enlarge.*data\.source\.enlarge=true.*3 of 4"
    ):
        ImageFolderSource(root, 16)
    assert ImageFolderSource(root, 16, enlarge=True)[0]["pixels"].shape == (3, 16, 16)
    assert ImageFolderSource(root, (8, 4))[0]["pixels"].shape == (3, 8, 4)
    shards = shards_of(tmp_path / "s", lambda i: {})
    with pytest.raises(ValueError, match=r"would enlarge.*6 of 6"):
        ShardSource(shards, image_size=(8, 9))
    assert ShardSource(shards, image_size=(8, 9), enlarge=True).image_shape == (3, 8, 9)


def test_a_small_image_that_was_not_looked_at_is_enlarged_and_said_once(tmp_path, caplog):
    """A run must not end in its middle at an image that nobody had looked at."""
    root = folder_of(tmp_path / "f", ("ant",), each=600, size=(16, 16))
    names = sorted(path.name for path in (root / "ant").iterdir())
    for place in (1, 3):
        (root / "ant" / names[place]).write_bytes(image(1))
    source = ImageFolderSource(root, 16)
    small = [i for i, path in enumerate(source.files) if path.name in (names[1], names[3])]
    assert "would enlarge" not in caplog.text
    for index in small:
        assert source[index]["pixels"].shape == (3, 16, 16)
    assert caplog.text.count("would enlarge") == 1 and names[1] in caplog.text


def test_channels_follow_the_first_image(tmp_path):
    grey = encode_png(np.zeros((8, 8), np.uint8))
    with ShardWriter(tmp_path / "g") as writer:
        writer.add("a", {"png": grey})
    source = ShardSource(tmp_path / "g", channels=None)
    assert source.image_shape == (1, 8, 8)
    assert source.fingerprint == ShardSource(tmp_path / "g", channels=1).fingerprint


def _picture(path, mode, size=8, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value, 10, 200)).save(path)


@pytest.mark.parametrize("grey, channels", [((0,), 3), ((0, 1, 2), 1), ((), 3)])
def test_one_grey_image_does_not_decide_the_channels_of_a_set(tmp_path, caplog, grey, channels):
    for index in range(3):
        _picture(tmp_path / "in" / f"{index}.png", "L" if index in grey else "RGB")
    make_shards(
        ["folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--order", "given"]
    )
    source = ShardSource(tmp_path / "out", channels=None)
    assert source.image_shape == (channels, 8, 8)
    assert {tuple(source[i]["pixels"].shape) for i in range(3)} == {(channels, 8, 8)}
    assert ("are grey and are read with three equal channels" in caplog.text) == (0 < len(grey) < 3)


def test_make_shards_says_what_it_enlarged(tmp_path, capsys):
    _picture(tmp_path / "in" / "a.png", "RGB")
    _picture(tmp_path / "in" / "b.png", "RGB", size=20)
    for resize, told in ((16, True), (8, False)):
        out = tmp_path / f"out{resize}"
        make_shards(
            ["folder", "--input", str(tmp_path / "in"), "--output", str(out), "--resize", str(resize)]
        )
        said = capsys.readouterr().out
        assert (f"1 images are smaller than --resize {resize} and were enlarged, such as" in said) == told
        assert ("a.png" in said) == told
        assert ShardSource(out).image_shape == (3, resize, resize)


def test_the_class_of_a_sample_is_read_where_its_label_is(tmp_path):
    with ShardWriter(tmp_path, meta={"num_classes": 4}) as writer:
        for index in range(4):
            members = {
                "png": encode_png(np.zeros((4, 4, 3), np.uint8)),
                "json": f'{{"label": {3 - index}}}'.encode(),
            }
            writer.add(f"part7_{index:04d}", members)
    source = ShardSource(tmp_path, {"json.label": "labels"})
    assert [source.class_of(i) for i in range(4)] == ["3", "2", "1", "0"]
