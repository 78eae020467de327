"""docs/extending.md: its model trains and samples as it stands, its names exist."""

import inspect
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from scans import list_scans
from tests.docs.commands import commands_of
from tests.helpers.own_files import own_files  # noqa: F401
from zigflow import plugins
from zigflow.build import build_model
from zigflow.nn import Denoiser
from zigflow.nn.denoiser import MEMBERS
from zigflow.sample_job import sample_from_config
from zigflow.settings import Settings, SettingsError
from zigflow.tools.__main__ import main as tool
from zigflow.train_job import train_from_config

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "extending.md"
PAGE = FILE.read_text()
COMMANDS = [command.line for command in commands_of(FILE) if not command.inline]
# The page's files: a name between backticks, some words, and the block that follows.
FILES = dict(
    re.findall(r"`([\w/]+\.(?:py|yaml))`(?:[^`]|`\w+`)*?:\n\n```\w+\n(.*?)^```", PAGE, flags=re.M | re.S)
)


@pytest.fixture
def project(own_files):  # noqa: F811
    """The files of the page, in the working directory."""
    assert set(FILES) == {"my_scans.py", "tokens.py", "conf/model/tokens.yaml"}
    for name, text in FILES.items():
        own_files.write(name, text)
    return own_files


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_accepted(project, line):
    words = shlex.split(line)
    if words[1:3] == ["-m", "zigflow.tools"]:
        folders = list(plugins._typed_folders)
        try:
            assert tool(words[3:]) == 0
        finally:
            plugins._typed_folders[:] = folders
    else:
        words = plugins.with_plugin_files(words[2:])
        plugins.prepare()
        plugins.check_command_line([*words, *([] if "-m" in words else ["run_dir=run"])], "default")
    assert ("checker" in list_scans()) == ("my_scans.py" in line)


@pytest.mark.parametrize("process", ["flow", "gaussian"])
def test_the_smallest_model_trains_and_samples(process, project, tmp_path):
    given = next(line for line in COMMANDS if "train_acc.py --config-dir" in line)
    words = shlex.split(given)[2:]
    assert words[:2] == ["--config-dir", "conf"] and words[-1] == "process=gaussian"
    small = [
        "data=synthetic", "data.image_size=4", "data.channels=1", "data.batch_size=4", f"process={process}",
        "data.train_steps=2", "log_every=1", "loop.progress=false", "run_dir=run",
    ]  # fmt: skip
    folders = list(plugins._typed_folders)
    plugins.add_config_dir("conf")
    try:
        train_from_config(plugins.compose_config([*words[2:-1], *small]))
    finally:
        plugins._typed_folders[:] = folders
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    project.forget()
    folder = sample_from_config(
        plugins.compose_config(
            ["ckpt=run", "ode.sampling_method=euler", "ode.num_steps=3", "num_fid_samples=2", "loop.progress=false",
             "run_dir=unused"], "sample",
        )
    )  # fmt: skip
    assert len(list(folder.glob("[0-9]*.png"))) == 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "x, t, y=None, return_features=()",
            "x, t",
            r"model=tokens: Tokens\.forward\(x, t\) is not called as",
        ),
        (
            "self.in_channels, self.img_dim",
            "self.channels, self.side",
            "model=tokens: Tokens does not say what it reads",
        ),
    ],
)
def test_a_model_that_does_not_meet_the_contract_is_refused_in_one_line(old, new, message, project):
    code = FILES["tokens.py"]
    assert old in code
    project.write("tokens.py", code.replace(old, new))
    folders = list(plugins._typed_folders)
    plugins.add_config_dir("conf")
    small = ["data=synthetic", "data.image_size=8", "data.channels=1", "run_dir=unused"]
    try:
        cfg = plugins.compose_config(["plugins=[tokens.py]", "model=tokens", *small])
    finally:
        plugins._typed_folders[:] = folders
    with pytest.raises(SettingsError, match=message) as error:
        build_model(Settings.from_mapping(plugins.plain(cfg)))
    assert "\n" not in str(error.value)


def test_named_files_and_methods_exist():
    codes = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))
    files = [code for code in codes if re.match(r"(zigflow|tests|config|docs)/", code)]
    assert len(files) > 10
    for name in files:
        assert (ROOT / name).exists(), name


def test_the_table_is_the_protocol():
    table = PAGE.partition("## The contract")[2].partition("## DiS")[0]
    rows = [row.split("|")[1:5] for row in re.findall(r"^\| `.*", table, flags=re.M)]
    named = {}
    for members, _, default, _ in rows:
        for member, given in re.findall(r"`(\w+)(?:\(([^`]*)\))?`", members):
            assert member not in named, f"{member} has two rows"
            named[member] = (given, default.strip())
    assert set(named) == MEMBERS
    assert {member for member, (_, default) in named.items() if default == "required"} == {
        "forward",
        "sample_shape",
    }
    for member, (given, _) in named.items():
        own = getattr(Denoiser, member)
        if inspect.isfunction(own):
            stated = [part.strip().partition("=")[0].lstrip("*") for part in re.split(r",(?![^(]*\))", given)]
            assert [p for p in stated if p] == list(inspect.signature(own).parameters)[1:], member


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", PAGE))
def test_links_exist(target):
    assert (ROOT / "docs" / target).resolve().is_file()
