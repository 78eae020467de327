"""What a configured path means wherever it comes from, and how an argument is quoted that Hydra does not read."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from zigflow import hydra_folders, plugins
from zigflow.build import make
from zigflow.paths import expanded, is_path_key, with_expanded_paths
from zigflow.settings import Settings, SettingsError
from zigflow.tools.__main__ import _with_home
from zigflow.typed_arguments import as_meant, check_grammar


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SETS", "/mnt/sets")
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_one_rule_for_every_path(home):
    for given, meant in (
        ("~", home),
        ("~/a/b", home / "a/b"),
        ("$HOME/a", home / "a"),
        ("${SETS}/x-{000..099}.tar", "/mnt/sets/x-{000..099}.tar"),
        ("a/~/$SETS", "a/~//mnt/sets"),
        ("a~", "a~"),
        ("s3://bucket/~/$x", "s3://bucket/~/$x"),
        ("pipe:cat $FILE", "pipe:cat $FILE"),
    ):
        assert expanded("k", given) == str(meant)
        assert expanded("k", expanded("k", given)) == str(meant)
    with pytest.raises(
        SettingsError, match=r"run_dir=\$NOT_SET/x: the environment variable NOT_SET is not set"
    ):
        expanded("run_dir", "$NOT_SET/x")
    with pytest.raises(SettingsError, match=r"ckpt=~nobody_here.pt: .* \./~nobody_here\.pt for a file"):
        expanded("ckpt", "~nobody_here.pt")


def test_every_key_of_the_configurations_that_names_a_file_is_a_path_key():
    """Of all YAML files: what is called so and is none, or is one and not called so, would show here."""
    found = set()

    def walk(node, prefix=""):
        for key, value in node.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else found.add(f"{prefix}{key}")

    for data in ("digits", "imagenet256_features", "image_folder", "churches256", "shards"):
        choices = [f"data={data}", "metrics=fid", "run_dir=r"]
        if data in ("image_folder", "shards"):
            choices.append("data.source.root=x")
        walk(plugins.plain(plugins.compose_config(choices)))
    walk(plugins.plain(plugins.compose_config(["run_dir=r"], "sample")))
    assert {key for key in found if is_path_key(key)} >= {
        "ckpt", "run_dir", "sample_dir", "captions", "codec.path", "data.source.root", "data.heldout.root",
        "data.tar_base",
        "metrics.inception_weights", "metrics.reference_stats",
    }  # fmt: skip
    assert not any(
        is_path_key(key) for key in ("weights", "vae", "train.path_type", "model.drop_path_rate", "note")
    )


def test_lists_nodes_of_classes_and_plug_ins_are_reached(home):
    given = {
        "note": "~ $NOT_SET",
        "data": {
            "source": {
                "_target_": "x.Y",
                "root": ["~/a", "s3://b"],
                "wherever": "~/c",
                "cache_dir": "$SETS/d",
                "limit": 3,
            },
            "limit": None,
        },
    }
    assert with_expanded_paths(given) == {
        "note": "~ $NOT_SET",
        "data": {
            "source": {
                "_target_": "x.Y", "root": [str(home / "a"), "s3://b"], "wherever": str(home / "c"),
                "cache_dir": "/mnt/sets/d", "limit": 3,
            },
            "limit": None,
        },
    }  # fmt: skip


class OwnSource:
    """Names its paths as nobody else does."""

    def __init__(self, archive: str | Path, pattern: str = ""):
        self.archive, self.pattern = archive, pattern


def test_what_a_class_annotates_as_a_path_is_one():
    node = {"_target_": f"{__name__}.OwnSource", "archive": "$SETS/a", "pattern": "$SETS"}
    built = make("data.source", node)
    assert (built.archive, built.pattern) == ("/mnt/sets/a", "$SETS")
    with pytest.raises(SettingsError, match=r"data\.source\.archive=\$NOT_SET"):
        make("data.source", {**node, "archive": "$NOT_SET"})


def test_wherever_it_comes_from_a_path_is_expanded(tmp_path, home, monkeypatch):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nrun_dir: {}\ndata:\n  source:\n    root: ~/photos\n"
    own = ["--config-dir", str(tmp_path / "conf"), "+experiment=mine", "metrics=none"]
    photos = ["data=image_folder", "data.num_classes=1", "data.image_size=16", "data.channels=3"]
    seen = []
    monkeypatch.setattr(plugins, "check_training", seen.append)
    for where, arguments in (
        ("~/runs", [*own, *photos]),
        ("typed", [*own, *photos, "run_dir=~/runs"]),
        ("typed", [*own, *photos, "run_dir='~/runs'"]),
        ("typed", [*own, *photos, "run_dir=$HOME/runs"]),
    ):
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text.format(where))
        plugins.check_command_line(as_meant(arguments), "default")
        assert (seen[-1].run_dir, seen[-1].data.source["root"]) == (str(home / "runs"), str(home / "photos"))
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text.format("$NOT_SET/runs"))
    with pytest.raises(SettingsError, match=r"run_dir=\$NOT_SET/runs: the environment variable NOT_SET"):
        plugins.check_command_line([*own, *photos], "default")
    for config_name in ("default", "sample"):
        with pytest.raises(SettingsError, match=r"ckpt=\$NOT_SET"):
            plugins.check_command_line(["ckpt=$NOT_SET"], config_name)
    assert as_meant(["hydra.sweep.dir=~/s"]) == [f'hydra.sweep.dir="{home}/s"']
    assert as_meant(["hydra.run.dir='$SETS/${x}'"]) == ["hydra.run.dir='$SETS/${x}'"]
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package hydra\nsweep:\n  dir: ~/s\n")
    with pytest.raises(SettingsError, match=rf"hydra.sweep.dir=~/s: .* write hydra.sweep.dir={home}/s"):
        plugins.check_command_line(own, "default")
    for folder, meant in (("$SETS/s", "/mnt/sets/s"), ("$SETS/${note}", "${oc.env:SETS}/${note}")):
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
            f"# @package hydra\nsweep:\n  dir: {folder}\n"
        )
        with pytest.raises(SettingsError) as refused:
            plugins.check_command_line(own, "default")
        assert str(refused.value).endswith(f"Hydra takes $SETS as a name: write hydra.sweep.dir={meant}")
    raw = plugins.compose_config(["run_dir=~/r"])
    assert Settings.from_mapping(plugins.plain(raw)).run_dir == str(home / "r")
    assert not (tmp_path / "~").exists()


def test_the_run_directory_that_is_typed_is_known_before_hydra(home):
    for argument, meant in (
        ("run_dir=~/a", home / "a"),
        ("run_dir='~/a'", home / "a"),
        ("run_dir=$SETS/a", Path("/mnt/sets/a")),
        ("run_dir=2024_05_01", Path("2024_05_01")),
        ("run_dir=1e3", Path("1e3")),
        ("+run_dir=~/a", home / "a"),
        ("++run_dir=2024_05_01", Path("2024_05_01")),
        ("++hydra.run.dir=~/a", home / "a"),
    ):
        assert hydra_folders.typed_run_dir([argument, "+debug=cpu_tiny"]) == str(meant)
    assert hydra_folders.typed_run_dir(["log_every=1"]) is None
    assert hydra_folders.typed_run_dir(["hydra.run.dir=~/a", "run_dir=~/a"]) == str(home / "a")


def test_a_path_that_looks_like_a_number_stays_as_it_is_typed():
    cfg = plugins.compose_config(["run_dir=2024_05_01", "sample_dir=1e3", "log_every=1_000", "ckpt=null"])
    assert (cfg.run_dir, cfg.sample_dir, cfg.log_every, cfg.ckpt) == ("2024_05_01", "1e3", 1000, None)
    numbers = ["model.num_paths=2", "+model.num_paths=2", "model.drop_path=0.1", "+data.source.cache=false"]
    numbers += ["data.source.cache=1", "+codec.path=null", "ckpt=true"]
    assert as_meant(numbers) == numbers
    typed = ["data.source.root=2024", "+codec.path=1e3", "++metrics.reference_stats=1_0"]
    assert as_meant(typed) == [
        'data.source.root="2024"',
        '+codec.path="1e3"',
        '++metrics.reference_stats="1_0"',
    ]


def test_a_text_that_looks_like_a_number_stays_as_it_is_typed():
    typed = [
        "note=2024_05_01",
        "wandb.name=1e5",
        "+wandb.entity=007",
        "optim.lr=1e-5",
        "data.limit=1_0",
        "run_dir=r",
    ]
    meant = Settings.from_mapping(plugins.plain(plugins.compose_config(typed)))
    assert (meant.note, meant.wandb.name, meant.wandb.entity) == ("2024_05_01", "1e5", "007")
    assert (meant.optim.lr, meant.data.limit) == (1e-5, 10)
    left = ["note=5", "diffusion.num_steps=250", "note=null", "note=true", "wandb=2", "model.name=1e5"]
    assert as_meant(left) == left


@pytest.mark.parametrize("sign", ["", "+"])
def test_a_number_whose_key_resembles_a_path_stays_a_number(sign):
    typed = [
        "model=digits_dim",
        f"{sign}model.num_paths=2",
        "data=shards",
        "+data.source.stream.cache=false",
        "run_dir=r",
    ]
    cfg = plugins.compose_config([*typed, "run_dir=r"])
    assert cfg.model.num_paths == 2 and isinstance(cfg.model.num_paths, int)
    assert cfg.data.source.stream.cache is False


@pytest.mark.parametrize(
    "value", ["runs/a=b/x", "out[1]", "a,b", "a{b}", "out(1)", "[a]", "a'b", 'a"b', "é #;", "a & b", "a, b=c"]
)
def test_the_quoting_that_is_shown_works(value):
    with pytest.raises(SettingsError) as error:
        check_grammar([f"ckpt={value}"])
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"ckpt={value}")
    shown = re.search(r"for the text as it stands type (.*)$", line)
    assert shown is not None
    (argument,) = shlex.split(shown[1])
    check_grammar([argument])
    assert OverridesParser.create().parse_override(argument).value() == value
    assert plugins.compose_config([argument, "run_dir=r"]).ckpt == value


def test_what_hydra_reads_is_left_alone():
    fine = [
        "data=digits",
        "+debug=cpu_tiny",
        "~wandb",
        "optim.betas=[0.9,0.99]",
        "note='a,b'",
        "data.source.root=[a,b]",
    ]
    check_grammar(fine)
    assert as_meant(fine) == fine
    check_grammar(["optim.lr=1e-3,1e-4", "optim.lr=range(1,4)"], multirun=True)
    with pytest.raises(SettingsError, match="needs --multirun"):
        check_grammar(["optim.lr=1e-3,1e-4"])
    with pytest.raises(SettingsError, match="ckpt=VALUE"):
        check_grammar(["ckpt"])


def test_arguments_of_the_tools_are_expanded(home):
    assert _with_home("--output=~/x") == f"--output={home}/x"
    assert _with_home("~/x") == f"{home}/x"
    assert _with_home("samples=~/x") == f"samples={home}/x"
    assert _with_home("codec.path=~/x") == "codec.path=~/x", "composed, and expanded then"
    assert _with_home("--depth=2") == "--depth=2"
