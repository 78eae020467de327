"""How benchmarks store results: as they come, whole or not at all, without a machine's paths; and their commands."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [*(ROOT / "docs").glob("*.md"), *BENCHMARKS.glob("*.py")]
# A command and the lines that go on with it; what follows two spaces and a # is a remark.
COMMANDS = [
    (page.name, match[1], re.sub(r"\\\n", " ", match[2]).partition("  #")[0])
    for page in PAGES
    for match in re.finditer(r"python benchmarks/(\w+)\.py((?:\\\n|[^\n`])*)", page.read_text())
]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))  # as for a script
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in ("machine", "models")})
    with pytest.MonkeyPatch.context() as patch:
        # It would hold for all tests of this process.
        patch.setattr(found.models, "keep_freed_memory", lambda: False)
        yield found
    sys.path.remove(str(BENCHMARKS))


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "script", sorted(p.stem for p in BENCHMARKS.glob("*.py") if 'argument("--device"' in p.read_text())
)
def test_a_device_that_is_not_there_is_named_in_one_line(bench, monkeypatch, tmp_path, script):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "cuda", "--output", str(target)])
    with pytest.raises(
        SystemExit, match=r"^--device cuda: there is cpu, .* no CUDA GPU .*; name one of .*$"
    ) as stop:
        importlib.import_module(script).main()
    assert "\n" not in stop.value.code
    assert not target.exists()


def test_devices_are_those_of_the_machine(bench, monkeypatch):
    chosen = bench.machine.chosen_device
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [str(chosen(name)) for name in (None, "cpu", "cuda", "cuda:1")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:1",
    ]
    for name in ("cuda:2", "mps", "gpu", ""):
        with pytest.raises(
            SystemExit, match=f"^--device {name}: there is cpu, cuda, cuda:0, cuda:1; name one"
        ):
            chosen(name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert str(chosen(None)) == "cpu"


def test_a_result_is_stored_as_it_comes(bench, tmp_path, capsys):
    target = tmp_path / "new" / "result.json"
    with bench.machine.Report({"note": "a test", "rows": []}, target) as report:
        assert not target.exists()
        report["rows"].append(1)
        report.save()
        assert read(target)["rows"] == [1]
        assert read(target)["complete"] is False
        report["rows"].append(2)
    assert read(target) == {"note": "a test", "rows": [1, 2], "complete": True}
    assert json.loads(capsys.readouterr().out) == read(target)
    assert [p.name for p in target.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "error", [SystemExit("wrong at the third"), KeyboardInterrupt(), ValueError("wrong")]
)
def test_what_was_measured_is_kept_when_a_run_stops(bench, tmp_path, error):
    target = tmp_path / "result.json"
    with pytest.raises(type(error)), bench.machine.Report({"rows": [1]}, target) as report:
        report.save()
        report["rows"].append(2)
        raise error
    assert read(target) == {"rows": [1, 2], "complete": False, "stopped": str(error) or "KeyboardInterrupt"}


def test_a_run_that_measured_nothing_leaves_an_older_result_alone(bench, tmp_path):
    target = tmp_path / "result.json"
    target.write_text("{}")
    with pytest.raises(SystemExit), bench.machine.Report({"rows": []}, target):
        raise SystemExit("wrong at the first")
    assert read(target) == {}


def test_a_difference_at_the_last_setting_keeps_the_others(bench, tmp_path, monkeypatch):
    from cases import SIZES, Difference

    def measure(setting, options):
        if setting == SIZES["small"][-1]:
            raise Difference(f"{setting.name}: ours differs: not timed")
        return {"name": setting.name}

    target = tmp_path / "result.json"
    monkeypatch.setattr(bench.models, "measure", measure)
    monkeypatch.setattr(
        sys, "argv", ["models.py", "--size", "small", "--device", "cpu", "--output", str(target)]
    )
    with pytest.raises(SystemExit, match="ours differs") as stopped:
        bench.models.main()
    assert stopped.value.code not in (None, 0)
    stored = read(target)
    assert [row["name"] for row in stored["settings"]] == [s.name for s in SIZES["small"][:-1]]
    assert stored["complete"] is False and "16384 tokens: ours differs: not timed" in stored["stopped"]


def test_a_profile_is_stored_and_printed(bench, tmp_path, monkeypatch, capsys):
    target = tmp_path / "result.json"
    words = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--modes",
        "eager",
        "--repeats",
        "1",
        "--profile",
        "dit",
        "ours",
        "--policy",
        "block",
        "--output",
    ]
    monkeypatch.setattr(sys, "argv", ["models.py", *words, str(target)])
    bench.models.main()
    (setting,) = read(target)["settings"]
    assert [(p["arrangement"], p["checkpoint_policy"]) for p in setting["profiles"]] == [
        ("dit", "block"),
        ("ours", "block"),
    ]
    for table in setting["profiles"]:
        assert sum(row["share"] for row in table["rows"]) == pytest.approx(1, abs=1e-3)
    assert "ours, eager, checkpoint policy block" in capsys.readouterr().out


def test_only_settings_that_are_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["models.py", "--size", "full", "--device", "cpu", "--only", "B/1", "2048"]
    )
    assert [s.name for s in bench.models.arguments().settings] == ["ZigMa-B/1 256 px", "ZigMa-B/2 2048 px"]
    monkeypatch.setattr(sys, "argv", ["models.py", "--size", "full", "--only", "B/3"])
    with pytest.raises(SystemExit):
        bench.models.arguments()
    assert "--only B/3: no setting of ['ZigMa-B/1 256 px'" in capsys.readouterr().err


def test_commands_hold_no_path_of_a_machine(bench, tmp_path, monkeypatch):
    words = [str(BENCHMARKS / "models.py"), "--note", "two words", "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", words)
    command = bench.machine.circumstances()["command"]
    assert command == "python benchmarks/models.py --note 'two words' --output result.json"


@pytest.mark.parametrize("page, script, words", COMMANDS)
def test_commands_of_docs_and_heads_name_options_that_exist(page, script, words):
    source = (BENCHMARKS / f"{script}.py").read_text()
    for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", words):
        assert f'"{option}"' in source, f"{page}: {script}.py has no {option}"


def test_there_are_commands_in_docs():
    assert {"kernels", "models", "digits"} <= {script for page, script, _ in COMMANDS if page.endswith(".md")}
