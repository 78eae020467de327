"""``plugins=[FILE.py]``: what is loaded, what is recorded, what is refused."""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
from contextlib import redirect_stderr

import hypothesis.strategies as st
import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hypothesis import example, given, settings
from PIL import Image

from scans import UnknownScanError, get_scan, list_scans
from tests.helpers.own_files import SCAN, own_files  # noqa: F401
from tests.packaging.runs import PACKAGE
from zigflow import cli, plugin_files, plugins, typed_plugins
from zigflow.engine.checkpoint import CheckpointError
from zigflow.metrics.base import METRICS
from zigflow.sample_job import sample_from_config
from zigflow.settings import SettingsError
from zigflow.tools.__main__ import main as tool
from zigflow.train_job import train_from_config

TINY = [
    "data=synthetic", "data.image_size=4", "data.train_steps=1", "data.batch_size=4", "model.embed_dim=8",
    "model.depth=2", "model.patch_size=1", "ckpt_every=1", "log_every=1", "loop.progress=false",
]  # fmt: skip
FEW = [
    "num_fid_samples=2", "ode.sampling_method=euler", "ode.num_steps=2", "metrics=none", "loop.progress=false",
    "run_dir=log",
]  # fmt: skip
FLAGS = st.lists(
    st.sampled_from([["-m"], ["--config-dir", "x=1"], ["-cn", "mine"], ["--resolve"]]), max_size=2
)
KEYS = st.lists(
    st.sampled_from(["data=digits", "+experiment=mine", "~metrics=x", "++a.b=1", "run/x@y=z"]), max_size=3
)


def parsed(arguments):
    """The overrides as Hydra's command line reads them, or None where it refuses to."""
    with redirect_stderr(io.StringIO()):
        try:
            return get_args_parser().parse_args(arguments).overrides
        except SystemExit:
            return None


@settings(max_examples=60)
@given(FLAGS, KEYS, FLAGS, st.booleans())
@example([], ["data=digits"], [["-m"]], True)
def test_one_more_override_is_read_wherever_others_are(before, keys, after, typed):
    arguments = [word for flag in before for word in flag] + keys + [word for flag in after for word in flag]
    if parsed(arguments) is None:
        return
    place = typed_plugins._among_overrides(arguments)
    made = [*arguments[:place], "plugins=[x]", *arguments[place:]]
    assert parsed(made) == [*keys, "plugins=[x]"]


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\n\r"), max_size=12), max_size=4))
def test_a_command_without_files_stays_as_it_is(words):
    arguments = [word for word in words if "plugins=" not in word and ".py:" not in word]
    assert typed_plugins.with_plugin_files(arguments) == arguments


@pytest.mark.parametrize(
    "arguments, environment, want",
    [
        (["plugins=[a.py]", "note=x"], "", ["note=x", 'plugins=["a.py"]']),
        (["+plugins=a.py"], "", ['plugins=["a.py"]']),
        (["scan=a.py:checker", "note=x"], "", ["scan=checker", "note=x", 'plugins=["a.py"]']),
        (["-m", "scan=hilbert,a.py:checker"], "", ["-m", "scan=hilbert,checker", 'plugins=["a.py"]']),
        (["scan=a.py:checker", "plugins=[a.py]"], "a.py", ["scan=checker", 'plugins=["a.py"]']),
        (["plugins=[b.py]"], "./a.py", ['plugins=["b.py","./a.py"]']),
        (["plugins=null", "--cfg", "job"], f"a.py{os.pathsep}b.py", ["--cfg", "job", 'plugins=["a.py","b.py"]']),
        (["plugins=[~/a.py, sub/c d.py]"], "", None),
        (["plugins=[]", "scan=hilbert"], "", ["scan=hilbert"]),
    ],
)  # fmt: skip
def test_each_way_to_name_a_file(own_files, monkeypatch, arguments, environment, want):  # noqa: F811
    own_files.write("a.py")
    own_files.write("b.py", "")
    monkeypatch.setenv("HOME", str(own_files.folder))
    monkeypatch.setenv("ZIGFLOW_PLUGINS", environment)
    if want is None:
        with pytest.raises(SettingsError, match=r"sub/c d.py .* does not exist"):
            typed_plugins.with_plugin_files(arguments)
        return
    made = typed_plugins.with_plugin_files(arguments)
    assert made == want
    if "checker" in " ".join(arguments):
        assert "checker" in list_scans()
        plugins.prepare()
        jobs = [a for a in made if a != "-m"]
        assert plugins.check_command_line([*jobs, "run_dir=x"] if "-m" not in made else made, "default")


BROKEN = {
    "raises": ("plugins=[f.py]", "x = 1\n\n1 / 0\n", r"f.py cannot be loaded: ZeroDivisionError: .* \(line 3\)"),
    "does not parse": ("plugins=f.py", "def f(:\n", r"f.py cannot be loaded: SyntaxError: .* \(line 1\)"),
    "leaves": ("plugins=f.py", "import sys\nsys.exit(3)\n", r"f.py cannot be loaded: SystemExit: 3 \(line 2\)"),
    "needs what is not there": ("plugins=f.py", "import nowhere_at_all", "ModuleNotFoundError: No module named"),
    "takes our name": (
        "plugins=f.py", SCAN.replace("checker", "hilbert"), "'hilbert' .* already registered by scans.hilbert.*f.hilb",
    ),
    "is not there": ("plugins=nix.py", "", r"nix.py \(.*\) does not exist: give plugins=\[FILE.py\]"),
    "is a folder": ("plugins=[folder]", "", r"folder \(.*\) is a folder: name the Python files"),
    "is no Python file": ("plugins=f.txt", "", "f.txt .* cannot be imported: rename it"),
    "is no name": ("plugins=my-scans.py", "", "my-scans.py .* cannot be imported: rename it"),
    "has our name": ("plugins=scans.py", "", r"name of another module \(scans, .*__init__.py\): rename the file"),
    "has a name of Python's": ("plugins=random.py", "", r"name of another module \(random, .*random.py\)"),
    "is named twice": ("plugins=[f.py,f.py]", "", "f.py is named twice: name it once"),
    "has another's name": ("plugins=[f.py,folder/f.py]", "", "f.py and .*folder/f.py have the same name: rename"),
    "is several values": ("plugins=f.py,g.py", "", r"several values: give one list, plugins=\[f.py,g.py\]"),
    "is no list": ("plugins={a:f.py}", "", "is no list of files"),
    "has no such scan": ("scan=f.py:chekcer", SCAN, "registers no scan of that name: .* Did you mean 'checker'"),
    "is a scan's and is missing": ("scan=nix.py:checker", SCAN, "nix.py .* does not exist"),
    "has a variable": ("plugins=[$NOT_SET_AT_ALL/f.py]", "", "environment variable NOT_SET_AT_ALL is not set"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_mistake_is_one_line(own_files, monkeypatch, capsys, name):  # noqa: F811
    argument, text, line = BROKEN[name]
    for file in ("f.py", "folder/f.py", "f.txt", "my-scans.py", "scans.py", "random.py", "g.py"):
        own_files.write(file, text if file == "f.py" else "")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["train_acc.py", argument, "run_dir=run"])
    before, modules = list_scans(), set(sys.modules)
    assert cli.train() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")
    assert re.search(line, said[0]), said[0]
    assert not (own_files.folder / "run").exists()
    if name != "has no such scan":
        assert list_scans() == before and not {"f", "g"} & (set(sys.modules) - modules)


def test_an_unknown_scan_says_how_a_file_is_loaded(own_files):  # noqa: F811
    with pytest.raises(
        SettingsError, match=r"scan=3 does not exist: .*scan=FILE.py:3, or plugins=\[FILE.py\]"
    ):
        plugins.compose_config(["scan=3"])
    with pytest.raises(UnknownScanError, match=r"plugins=\[FILE.py\]"):
        get_scan("checker")
    with pytest.raises(SettingsError, match=r"(?s)my_net.Net.*a file of your own give plugins=\[my_net.py\]"):
        train_from_config(plugins.compose_config([*TINY, "model._target_=my_net.Net", "run_dir=run"]))


def test_a_file_is_run_once_and_again_when_it_was_edited(own_files, tmp_path):  # noqa: F811
    file = own_files.write("f.py", "import builtins\nbuiltins.count = getattr(builtins, 'count', 0) + 1\n")
    import builtins

    try:
        first = plugin_files.load(["f.py"])
        assert plugin_files.load([str(file)])[0].sha256 == first[0].sha256
        moved = own_files.write("moved/f.py", file.read_text())
        plugin_files.load([str(moved)])
        assert builtins.count == 1
        file.write_text(file.read_text() + "# edited\n")
        plugin_files.load(["f.py"])
        assert builtins.count == 2
        with pytest.raises(SettingsError, match=r"has loaded .*f.py, and .*moved/f.py has the same name"):
            plugin_files.load([str(moved)])
    finally:
        del builtins.count


def test_a_file_may_import_its_neighbour(own_files):  # noqa: F811
    own_files.write("sub/neighbour_of_f.py", "VALUE = 3\n")
    own_files.write("sub/f.py", "from neighbour_of_f import VALUE\n")
    before = list(sys.path)
    plugin_files.load(["sub/f.py"])
    assert sys.modules["f"].VALUE == 3
    assert sys.path == [*before, str(own_files.folder / "sub")]
    del sys.modules["neighbour_of_f"]


def test_help_neither_fails_nor_imports_torch(own_files, monkeypatch, capsys, caplog):  # noqa: F811
    own_files.write("a.py")
    own_files.write("net.py", "import torch\n")
    own_files.write(
        "bad.py", "from scans import register_scan\nregister_scan('unfinished')(lambda h, w: [])\n1 / 0\n"
    )
    monkeypatch.setenv("ZIGFLOW_PLUGINS", os.pathsep.join(["bad.py", "net.py", "a.py"]))
    monkeypatch.delitem(sys.modules, "torch")
    # Also where the scan that is asked for is in such a file.
    monkeypatch.setattr(sys, "argv", ["train_acc.py", "--help", "scan=net.py:dense", "log_every=7"])
    assert cli.train() == 0
    shown = capsys.readouterr().out
    assert "checker" in shown and "unfinished" not in shown and "7" in shown
    assert "torch" not in sys.modules
    told = sorted(r.getMessage() for r in caplog.records if r.name == "zigflow.plugin_files")
    assert len(told) == 2 and not any("\n" in line for line in told)
    assert "bad.py cannot be loaded: ZeroDivisionError" in told[0] and "net.py imports torch" in told[1]


def test_tools_take_the_files(own_files, monkeypatch, capsys, caplog):  # noqa: F811
    own_files.write("a.py")
    own_files.write("bad.py", "1 / 0\n")
    assert tool(["plot-scans", "--scan", "a.py:checker", "--height=4", "--width=4", "--output=one.png"]) == 0
    own_files.forget()
    assert tool(["plot-scans", "--scan=checker", "--output=two.png"]) == 2
    assert tool(["plot-scans", "--scan=checker", "--height=4", "--output=two.png", "plugins=a.py"]) == 0
    own_files.forget()
    monkeypatch.setenv("ZIGFLOW_PLUGINS", os.pathsep.join(["a.py", "bad.py"]))
    capsys.readouterr()
    assert tool(["list", "scans"]) == 0
    assert "checker" in capsys.readouterr().out
    assert tool(["list", "plugins"]) == 0
    shown = capsys.readouterr().out
    assert "a SHA-256" in shown and "bad.py" in shown and "failed to load" in shown
    assert tool(["show-config", "scan=checker"]) == 1
    assert "bad.py cannot be loaded" in capsys.readouterr().err
    monkeypatch.setenv("ZIGFLOW_PLUGINS", "a.py")
    assert tool(["show-config", "scan=checker", "--origins"]) == 0
    assert 'plugins=["a.py"]' in capsys.readouterr().out


METRIC = """
from one_of_each_metric import Brightness
from zigflow.metrics.base import METRICS

METRICS.register("of_mine", Brightness)
"""


def test_evaluate_takes_a_metric_of_a_file(own_files, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    monkeypatch.setattr(METRICS, "_origins", dict(METRICS._origins))
    own_files.write("one_of_each_metric.py", (PACKAGE / "one_of_each" / "metric.py").read_text())
    own_files.write("mine.py", METRIC)
    (own_files.folder / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4), (40 * number,) * 3).save(own_files.folder / "images" / f"{number}.png")
    small = ["data=synthetic", "data.image_size=4", "model.embed_dim=8", "model.patch_size=1"]
    try:
        assert tool(["evaluate", "samples=images", "plugins=mine.py", "metrics=of_mine", *small]) == 0
        kept = json.loads((own_files.folder / "images" / "results.json").read_text())
        assert kept["metrics"]["brightness_error"] > 0
        assert list(kept["protocol"]["plugin_files"]) == [str(own_files.folder / "mine.py")]
        capsys.readouterr()
        assert tool(["evaluate", "samples=images", "metrics=of_min", *small]) == 1
        assert "did you mean of_mine" in capsys.readouterr().err
    finally:
        sys.modules.pop("one_of_each_metric", None)
        ConfigStore.instance().repo.get("metrics", {}).pop("of_mine.yaml", None)


def test_a_yaml_of_ones_own_may_name_files(own_files, monkeypatch):  # noqa: F811
    own_files.write(
        "codecs_of_mine.py", "from zigflow.codec import IdentityCodec\nclass Mine(IdentityCodec): pass\n"
    )
    own_files.write("conf/codec/mine.yaml", "_target_: codecs_of_mine.Mine\nscale: 0.5\n")
    text = "# @package _global_\nplugins: [codecs_of_mine.py]\ndefaults:\n  - override /codec: mine\n"
    own_files.write("conf/mine/run.yaml", text)
    typed = ["--config-dir", "conf", "+mine=run", *TINY, "run_dir=run"]
    plugins.check_command_line(typed, "default")
    # Also where the choice follows the data, which Hydra passes over in silence.
    plugins.check_command_line(["--config-dir=conf", "codec=mine", *TINY, "run_dir=run"], "default")
    with pytest.raises(SettingsError, match="codec=mine does not exist"):
        plugins.check_command_line(["codec=mine", *TINY, "run_dir=run"], "default")
    plugins.add_config_dir("conf")
    try:
        train_from_config(plugins.compose_config(["+mine=run", *TINY, "run_dir=run"]))
    finally:
        plugins._typed_folders.clear()
    kept = json.loads(next(own_files.folder.glob("run/checkpoints/step-*/trainer.json")).read_text())
    assert [file["given"] for file in kept["plugin_files"]] == ["codecs_of_mine.py"]
    with pytest.raises(SettingsError, match="--config-dir nowhere: there is no such folder"):
        plugins.add_config_dir("nowhere")


def train(*more):
    return train_from_config(plugins.compose_config([*TINY, "run_dir=run", *more]))


def sample(*more):
    return sample_from_config(plugins.compose_config([*FEW, *more], "sample"))


def test_a_checkpoint_loads_its_files_again(own_files, caplog, monkeypatch):  # noqa: F811
    file = own_files.write("project/f.py")
    run = train("scan=project/f.py:checker", f"run_dir={own_files.folder / 'project' / 'run'}")
    kept = json.loads((run / "checkpoints/step-0000001/trainer.json").read_text())
    config = json.loads((run / "checkpoints/step-0000001/config.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert kept["plugin_files"] == [
        {"given": "project/f.py", "absolute": str(file), "from_run": "../f.py", "sha256": digest}
    ]  # fmt: skip
    assert config["plugins"] == [str(file)] and config["scan"]["name"] == "checker"

    # In another process, from another folder; the results say the file.
    own_files.forget()
    elsewhere = own_files.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = sample(f"ckpt={run}")
    assert json.loads((folder / "results.json").read_text())["protocol"]["plugin_files"] == {
        str(file): kept["plugin_files"][0]["sha256"]
    }

    # Resumed without naming it; a new run that starts from its weights records it, too.
    own_files.forget()
    train("scan=checker", f"run_dir={run}", "data.train_steps=2")
    assert (run / "checkpoints" / "step-0000002").is_dir()
    own_files.forget()
    train("scan=checker", f"ckpt={run}", "run_dir=second")
    again = json.loads(next(elsewhere.glob("second/checkpoints/*/trainer.json")).read_text())
    assert again["plugin_files"][0]["absolute"] == str(file)

    # Moved together with the run: found from there.
    own_files.forget()
    shutil.move(own_files.folder / "project", own_files.folder / "moved")
    moved = own_files.folder / "moved" / "run"
    sample(f"ckpt={moved}", "num_fid_samples=1")
    assert str(own_files.folder / "moved" / "f.py") in [f.path for f in plugin_files.loaded()]

    # Gone: one line, and the way out.
    own_files.forget()
    shutil.move(own_files.folder / "moved" / "f.py", elsewhere / "f.py.kept")
    with pytest.raises(
        SettingsError,
        match=r"plug-in file .*project/f.py \(SHA-256 \w{8}\), which is not there: give plugins=\[FOLDER/f.py\]",
    ):
        sample(f"ckpt={moved / 'checkpoints' / 'step-0000002'}")

    # Given, and edited where it changes nothing: told of. Edited so that the order differs: refused.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        own_files.write("elsewhere/f.py", SCAN + "# edited\n")
        sample(f"ckpt={moved}", "plugins=f.py", "num_fid_samples=1")
    assert "is not what" in caplog.text and "was written with (SHA-256" in caplog.text
    own_files.write("elsewhere/f.py", SCAN.replace("x + y", "x + 2 * y"))
    with pytest.raises(CheckpointError, match="trained along another order"):
        sample(f"ckpt={moved}", "plugins=f.py", "num_fid_samples=1")
    with pytest.raises(CheckpointError, match="trained along another order"):
        train("scan=checker", "plugins=f.py", f"run_dir={moved}", "data.train_steps=3")


WORK = """

def work(init, queue):
    init(0)
    from scans import list_scans
    from zigflow import plugin_files
    queue.put(("checker" in list_scans(), [file.module for file in plugin_files.loaded()]))
"""


def test_a_worker_that_is_spawned_has_the_files(own_files):  # noqa: F811
    own_files.write("f.py", SCAN + WORK)
    own_files.write("g.py", SCAN.replace("checker", "other"))
    assert plugin_files.in_workers() is None
    plugin_files.load(["f.py", "g.py"])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=sys.modules["f"].work, args=(plugin_files.in_workers(), queue))
    worker.start()
    assert queue.get(timeout=60) == (True, ["f", "g"])
    worker.join()
    # In a forked one they are there, whatever the file holds by now.
    own_files.write("f.py", "1 / 0\n")
    plugin_files.in_workers()(0)
    files = plugin_files.loaded()
    own_files.forget()
    with pytest.raises(SettingsError, match=r"f.py was edited while the run goes on"):
        plugin_files._load_in_worker(files, 0)
