"""Hydra's settings of folders never split a run in two, and what Hydra cannot do is said in one line."""

import os
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from zigflow import cli, hydra_folders, plugins, train_job
from zigflow.engine import exits
from zigflow.engine.signals import stop
from zigflow.settings import Settings, SettingsError
from zigflow.typed_arguments import as_meant


@pytest.fixture(autouse=True)
def _as_before():
    with stop.installed():
        yield
    exits.note.release()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command in ``tmp_path``; returns its exit code and the folder and working directory of every job."""

    def run(*arguments):
        seen = []

        def work(cfg, watch=None):
            seen.append((cfg.run_dir, Path.cwd()))
            Path(cfg.run_dir, "written").write_text("")

        plugins.run_id.cache_clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RUN_ID", "set-back-after-the-test")
        monkeypatch.delenv("RUN_ID")
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["train_acc.py", *arguments])
        monkeypatch.setattr(train_job, "train_from_config", work)
        return cli.train(), seen

    return run


def folders_with(name, root):
    return sorted(str(p.parent.relative_to(root)) for p in root.rglob(name))


@pytest.mark.parametrize(
    "arguments, folder",
    [
        (["run_dir=here/run", "hydra.job.chdir=true"], "here/run"),
        (["hydra.run.dir=here/${note}", "note=x", "hydra.job.chdir=true"], "here/x"),
        (["run_dir=a", "hydra.run.dir=./a"], "a"),
    ],
)
def test_a_run_has_one_folder_whoever_names_it(arguments, folder, command, tmp_path):
    code, seen = command(*arguments)
    assert code == 0
    assert [(Path(d), cwd) for d, cwd in seen] == [(Path(folder), tmp_path)]
    # Our files, Hydra's and the log, and none anywhere else.
    for name in ("written", "train.log"):
        assert folders_with(name, tmp_path) == [folder]
    assert folders_with("config.yaml", tmp_path) == [f"{folder}/.hydra"]


def test_a_run_is_composed_and_validated_once(command, monkeypatch):
    counted = []
    load, read = ConfigLoaderImpl.load_configuration, Settings.from_mapping
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_configuration", lambda *a, **k: counted.append("composed") or load(*a, **k)
    )
    monkeypatch.setattr(Settings, "from_mapping", lambda values: counted.append("validated") or read(values))
    assert command("optim.lr=1e-3", "run_dir=a") == (0, [("a", Path.cwd())])
    assert counted == ["composed", "validated"]


def test_without_a_name_it_is_named_once(command, tmp_path):
    code, seen = command("hydra.job.chdir=true")
    assert code == 0
    assert folders_with("written", tmp_path) == folders_with("train.log", tmp_path) == [seen[0][0]]
    assert seen[0][0].startswith("outputs/train/")


def test_a_sweep_goes_where_hydra_is_told(command, tmp_path):
    asked = ["hydra.sweep.dir=mine", "hydra.sweep.subdir=lr-${optim.lr}", "hydra.job.chdir=true"]
    code, seen = command("-m", "optim.lr=1e-3,1e-4", *asked)
    folders = ["mine/lr-0.001", "mine/lr-0.0001"]
    assert code == 0
    assert seen == [(folder, tmp_path) for folder in folders]
    assert folders_with("written", tmp_path) == folders_with("train.log", tmp_path) == sorted(folders)


def test_the_folders_of_a_sweep_say_what_was_swept(command, tmp_path):
    asked = ["hydra.sweep.dir=mine", "loop.progress=false", "debug=cpu_tiny"]
    code, seen = command("-m", "optim.lr=1e-3,1e-4", "scan=hilbert,spiral", "note=1e5", *asked)
    assert code == 0
    assert [folder for folder, _ in seen] == [
        f"mine/{number}_optim.lr-{lr}_scan-{scan}"
        for number, (lr, scan) in enumerate(
            (lr, s) for lr in ("0.001", "0.0001") for s in ("hilbert", "spiral")
        )
    ]


def test_a_folder_of_a_job_is_a_name_that_needs_no_quotes(tmp_path):
    assert hydra_folders.job_folder(3, "++a.b=[0.9,0.99],data.root=/x y/z,n=", str(tmp_path)) == (
        "3_a.b-0.9_0.99_data.root-x-y-z_n"
    )
    assert hydra_folders.job_folder(0, "", str(tmp_path)) == "0"
    long = hydra_folders.job_folder(1, f"note={'x' * 300}", str(tmp_path))
    assert len(long) <= 110 and as_meant([f"ckpt={long}"]) == [f"ckpt={long}"]
    # A sweep of 0.1, whose folders are numbers, is continued.
    (tmp_path / "3").mkdir()
    assert hydra_folders.job_folder(3, "a=1", str(tmp_path)) == "3"


@pytest.mark.parametrize(
    "swept, template",
    [
        ("note=a,b", "${hydra:job.num}"),
        ("note=a,b", "x-${hydra.job.override_dirname}"),
        ("model=digits_zigzag8,digits_dit", "${hydra:runtime.choices.model}"),
    ],
)
def test_what_tells_the_jobs_apart_may_name_their_folders(swept, template, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN_ID", "sweep")
    plugins.prepare()
    arguments = ["-m", swept, f"hydra.sweep.subdir={template}"]
    assert plugins.check_command_line(arguments, "default").arguments == arguments


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["run_dir=a", "hydra.run.dir=b"], ["run_dir=a", "hydra.run.dir=b", "drop"]),
        (["-m", "optim.lr=1,2", "hydra.sweep.subdir=same"], ["hydra.sweep.subdir=same", "override_dirname"]),
        (["-m", "optim.lr=1,2", "hydra.sweep.subdir='${hydra.job.name}'"], ["job.name} puts the 2 runs"]),
        (["-m", "optim.lr=1,2", "note=a,b", "hydra.sweep.subdir='${note}'"], ["${note} puts the 4 runs"]),
        (["++run_dir=a", "hydra.run.dir=b"], ["run_dir=a", "hydra.run.dir=b", "drop"]),
        (["-m", "optim.lr=1,2", "+run_dir=a"], ["run_dir=", "hydra.sweep.dir=FOLDER"]),
        (["-m", "optim.lr=1,2", "run_dir=a"], ["run_dir=", "hydra.sweep.dir=FOLDER"]),
    ],
)
def test_two_folders_for_one_run_and_two_runs_in_one_folder_are_refused(
    arguments, parts, command, tmp_path, capsys
):
    code, seen = command(*arguments)
    assert (code, seen) == (2, [])
    told = capsys.readouterr().err
    assert all(part in told for part in parts)
    assert told.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_yaml_that_names_another_folder_is_refused(command, tmp_path, capsys):
    (tmp_path / "mine" / "place").mkdir(parents=True)
    (tmp_path / "mine" / "place" / "there.yaml").write_text("# @package _global_\nrun_dir: there\n")
    code, seen = command("--config-dir", "mine", "+place=there", "hydra.run.dir=here")
    assert (code, seen) == (2, [])
    assert "run_dir=there and hydra.run.dir=" in capsys.readouterr().err
    code, seen = command("--config-dir", "mine", "+place=there")
    assert (code, seen) == (0, [("there", tmp_path)])


def test_a_python_that_hydra_cannot_read_command_lines_on_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    """Python 3.14 renders help texts when an option is added; Hydra 1.3's is no text."""
    import argparse

    add = argparse.ArgumentParser.add_argument

    def checking(self, *names, **options):
        try:
            "%" in options.get("help", "")
        except TypeError as error:
            raise ValueError("badly formed help string") from error
        return add(self, *names, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checking)
    monkeypatch.setattr(plugins.platform, "python_version", lambda: "3.14.0")
    with pytest.raises(SettingsError, match=r"Python 3\.14\.0: hydra-core 1\.\S+ cannot .* 3\.11 to 3\.13"):
        plugins.check_command_line([], "default")
    monkeypatch.setattr(sys, "argv", ["train_acc.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert cli.train() == 2
    assert capsys.readouterr().err.count("\n") == 1
