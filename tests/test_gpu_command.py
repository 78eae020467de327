"""benchmarks/gpu.py: its plan on a CPU, and what its driver does when something fails, dies, hangs or is cut."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NAMES = (
    "gpu",
    "gpu_plan",
    "gpu_functions",
    "gpu_results",
    "gpu_table",
    "gpu_worker",
    "gpu_kernels",
    "kernels_gpu",
    "machine",
)
RUN = {"hardware": "a card", "commit": "c" * 40, "versions": {"torch": "2"}}


@pytest.fixture(scope="module")
def bench():
    # As for a script; its workers get this path, too.
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(BENCHMARKS))


def options(**changes):
    given = {"again": False, "stage_seconds": 100.0, "budget": 100.0}
    return Namespace(**{**given, **changes})


def toy(bench, name, function, stage="sizes", seconds=60.0, **more):
    return bench.gpu_plan.Measurement(stage, name, function, {}, seconds, **more)


class Scripted:
    """A worker that answers from a list."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, name, arguments, seconds):
        self.asked.append((name, arguments, seconds))
        return {"seconds": 1.0, **self.answers.pop(0)}

    def stop(self):
        pass


def done(**result):
    return {"status": "done", "result": result}


def test_names_are_unique_and_every_function_is_planned(bench):
    for tiny in (False, True):
        every = bench.gpu_plan.plan(tiny)
        names = [(m.stage, m.name) for m in every]
        assert len(set(names)) == len(names)
        assert list(dict.fromkeys(m.stage for m in every)) == list(bench.gpu_plan.STAGES)
        assert {m.function for m in every} == set(bench.gpu_functions.FUNCTIONS)
        assert all(m.seconds <= bench.gpu_plan.STAGE_SECONDS for m in every)
        json.dumps([m.arguments for m in every])


def test_what_times_a_kernel_needs_checks_that_are_planned(bench):
    for tiny in (False, True):
        every = bench.gpu_plan.plan(tiny)
        checks = [m.name for m in every if m.stage == "kernels"]
        for measurement in every:
            assert (measurement.stage == "kernels" or "attention" in measurement.name) == (
                not measurement.needs
            )
            for op, dtype in measurement.needs:
                assert any(name.startswith(f"{op} {dtype} ") for name in checks)


def test_the_tables_shapes_are_checked_in_every_dtype(bench):
    checks = [m for m in bench.gpu_plan.plan(False) if m.stage == "kernels"]
    for shape in bench.kernels_gpu.SHAPES:
        for dtype in bench.gpu_plan.DTYPES:
            for function, size in (("check_scan", shape), ("check_conv", shape[:3])):
                found = {m.arguments["reverse"] for m in checks if m.function == function
                         and m.arguments["shape"] == size and m.arguments["dtype"] == dtype}  # fmt: skip
                assert found == {False, True}, (function, size, dtype)
            tokens = (*shape[:2], shape[2] // 2)
            assert any(m.function == "check_tokens" and m.arguments["shape"] == tokens for m in checks)


def test_kernels_are_checked_and_timed_at_tiny_sizes(bench, monkeypatch):
    """The stages on single kernels, on whatever backend this machine has."""
    for measurement in bench.gpu_plan.plan(True):
        if measurement.stage not in ("kernels", "peers") and measurement.function != "bits_of_kernels":
            continue
        given = dict(measurement.arguments)
        if measurement.function.startswith("time_"):
            given["refused"] = {}
        found = bench.gpu_functions.FUNCTIONS[measurement.function](**given, device="cpu")
        assert not found.get("wrong"), (measurement.name, found)
        json.dumps(found, allow_nan=False)
        if measurement.stage == "kernels":
            assert 0 <= found["worst_over_allowed"] <= 1, (measurement.name, found)
        if measurement.stage == "peers":
            for kind in ("forward", "backward"):
                times = found["milliseconds"][kind]
                assert times and all(ms > 0 for ms in times.values()), measurement.name


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "add_norm_modulate", "gated_add"])
@pytest.mark.parametrize("fault", ["value", "gradient", "nan"])
def test_a_wrong_kernel_is_found(bench, monkeypatch, op, fault):
    """One value of one token, or one gradient, or one number that is none."""
    right = getattr(bench.gpu_kernels, op)

    def spoiled(tensor):
        if fault == "gradient":
            return tensor + (0.3 * tensor - (0.3 * tensor).detach())
        spoil = torch.zeros_like(tensor)
        spoil[-1, -1, -1] = float("nan") if fault == "nan" else 1.0
        return tensor + spoil

    def wrong(*args, backend="auto", **given):
        out = right(*args, backend=backend, **given)
        if backend == "reference" or backend == "torch":
            return out
        return spoiled(out) if isinstance(out, torch.Tensor) else (spoiled(out[0]), *out[1:])

    monkeypatch.setattr(bench.gpu_kernels, op, wrong)
    function, given = {
        "selective_scan": ("check_scan", {"shape": (1, 5, 8, 2), "reverse": True}),
        "causal_conv1d": ("check_conv", {"shape": (1, 5, 8), "reverse": True}),
    }.get(op, ("check_tokens", {"shape": (1, 5, 8), "stream": "float32", "centered": False}))
    found = bench.gpu_functions.FUNCTIONS[function](**given, dtype="float32", device="cpu")
    assert found["wrong"] and "allowed" in found["wrong"][0]
    json.dumps(found, allow_nan=False)


def test_the_definition_in_pieces_is_the_definition(bench, monkeypatch):
    inputs = bench.gpu_kernels.arguments((3, 5, 7, 2), torch.float32)
    weight = bench.gpu_kernels._weight((3, 5, 7), "cpu")
    whole = bench.gpu_kernels.exact_scan(inputs, weight, True)
    for piece in (8 * 5 * 7 * 2 * 2, 8 * 5 * 3 * 2, 1):
        monkeypatch.setattr(bench.gpu_kernels, "_PIECE", piece)
        parts = bench.gpu_kernels.exact_scan(inputs, weight, True)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-12)


def test_whatever_happens_the_rest_is_measured_and_stored(bench, tmp_path):
    """An error, a process that dies and one that hangs: each is recorded, and a new process goes on."""
    target = tmp_path / "gpu.json"
    chosen = [
        toy(bench, "first", "right"), toy(bench, "off", "off"), toy(bench, "second", "right"),
        toy(bench, "raises", "raises"), toy(bench, "dies", "dies"), toy(bench, "hangs", "hangs", seconds=0.5),
        toy(bench, "leaves", "leaves"), toy(bench, "no number", "no_number"), toy(bench, "last", "right"),
    ]  # fmt: skip
    results = bench.gpu_results.Results(target, RUN, True)
    with bench.gpu_worker.Worker("cpu", "tests.gpu_toys") as worker:
        left = bench.gpu.run(chosen, [], results, worker, options())
        process = worker._process
    assert left == [] and not process.is_alive()
    stored = json.loads(target.read_text())["stages"]["sizes"]
    statuses = {name: entry["status"] for name, entry in stored.items()}
    assert statuses == {
        "first": "done", "off": "wrong", "second": "done", "raises": "failed", "dies": "crashed",
        "hangs": "timed out", "leaves": "failed", "no number": "failed", "last": "done",
    }  # fmt: skip
    assert stored["first"]["result"]["device"] == "cpu"
    # What is wrong leaves a process sound; what fails does not.
    assert stored["second"]["result"]["process"] == stored["first"]["result"]["process"]
    assert stored["last"]["result"]["process"] != stored["first"]["result"]["process"]
    assert stored["raises"]["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert stored["raises"]["at"][-1].startswith("tests/gpu_toys.py:")
    assert "SIGKILL" in stored["dies"]["error"] and "the driver says why" in stored["dies"]["error"]
    assert "stopped" in stored["hangs"]["error"]
    assert stored["leaves"]["error"] == "SystemExit: a contender is wrong"
    text = bench.gpu_table.table({"dry_run": False, "runs": [RUN], "stages": {"determinism": {
        name: entry for name, entry in stored.items() if entry["status"] not in ("done", "wrong")}}})  # fmt: skip
    assert "- dies: crashed: the process ended with SIGKILL" in text and "a card" in text


def test_two_runs_are_two_processes(bench):
    results = bench.gpu_results.Results(None, RUN, True)
    told = toy(bench, "told", "differs", "determinism", twice=True)
    broken = toy(bench, "broken", "differs", "determinism", twice=True, must_agree=True)
    with bench.gpu_worker.Worker("cpu", "tests.gpu_toys") as worker:
        bench.gpu.run([told], [], results, worker, options())
    entry = results.entry(told)
    assert entry["status"] == "done" and entry["result"]["differ"] == ["process"]
    said = bench.gpu.measure(broken, results, Scripted(done(bits=1), done(bits=2)), [], 10)
    assert said["status"] == "wrong" and said["result"]["wrong"] == ["two runs differ: bits"]
    assert (
        bench.gpu.measure(broken, results, Scripted(done(bits=1), done(bits=1)), [], 10)["status"] == "done"
    )
    failed = {"status": "failed", "error": "no"}
    assert bench.gpu.measure(broken, results, Scripted(done(bits=1), failed), [], 10)["error"] == "no"


def test_what_is_stored_is_not_measured_again(bench, tmp_path, monkeypatch):
    target = tmp_path / "gpu.json"
    check, timing = toy(bench, "selective_scan float32 x", "right", "kernels"), toy(bench, "timing", "right")
    broken = toy(bench, "broken", "raises")

    def asked(**changes):
        results = bench.gpu_results.Results(target, RUN, False)
        results.now.update(changes)
        worker = Scripted(*(3 * [done()]))
        bench.gpu.run([check, timing, broken], [check], results, worker, options())
        return [name for name, _, _ in worker.asked]

    results = bench.gpu_results.Results(target, RUN, False)
    failure = {"status": "failed", "error": "no"}
    bench.gpu.run([check, timing, broken], [check], results, Scripted(done(), done(), failure), options())
    assert asked() == []
    assert asked(code="other") == ["raises"]
    assert asked(code="other") == []
    assert asked(kernels="other") == ["right"]  # the check alone
    listed = bench.gpu.listing([check, timing, broken], bench.gpu_results.Results(target, RUN, False))
    assert "sizes           2 of   2 done\n" in listed
    assert "kernels         0 of   1 done, 1 of other kernels\n" in listed
    worker = Scripted(*(3 * [done()]))
    bench.gpu.run([check, timing, broken], [check], results, worker, options(again=True))
    assert len(worker.asked) == 3


def test_budgets_stop_between_measurements_and_cut_no_result(bench, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.gpu.time, "monotonic", lambda: now[0])

    class Slow(Scripted):
        def ask(self, name, arguments, seconds):
            now[0] += 40
            return super().ask(name, arguments, seconds)

    chosen = [toy(bench, str(n), "right", "steps" if n < 4 else "sizes") for n in range(6)]
    results = bench.gpu_results.Results(None, RUN, False)
    worker = Slow(*(6 * [done()]))
    left = bench.gpu.run(chosen, [], results, worker, options(stage_seconds=100, budget=130))
    # Three of the first stage in its 100 s, of which the third was given what was left; one of the next.
    assert [m.name for m in left] == ["3", "5"]
    assert [seconds for _, _, seconds in worker.asked] == [60, 60, 20, 10]
    late = bench.gpu_results.Results(None, RUN, False)
    cut = Slow({"status": "timed out", "error": "no result"})
    (only,) = bench.gpu.run(chosen[:1], [], late, cut, options(stage_seconds=30))
    assert only is chosen[0] and late.entry(only) is None, "cut by the budget, not by its own limit"


def test_a_wrong_kernel_is_not_timed(bench):
    check = toy(bench, "selective_scan bfloat16 (1, 2)", "off", "kernels")
    other = toy(bench, "selective_scan float32 (1, 2)", "right", "kernels")
    need = (("selective_scan", "bfloat16"),)
    model, scan = (
        toy(bench, "model", "right", needs=need),
        toy(bench, "scan", "time_scan", "peers", needs=need),
    )
    fine = toy(bench, "fine", "right", needs=(("selective_scan", "float32"),))
    chosen, checks = [check, other, model, scan, fine], [check, other]
    results = bench.gpu_results.Results(None, RUN, False)
    before = Scripted(done(), done())
    assert bench.gpu.run([model, fine], checks, results, before, options()) == [] and not before.asked
    assert "1 of 1 checks of selective_scan in bfloat16 are to come" in results.entry(model)["error"]
    wrong = {"status": "wrong", "result": {"wrong": ["off by 1"]}}
    worker = Scripted(wrong, done(), done(), done())
    bench.gpu.run(chosen, checks, results, worker, options())
    assert results.entry(model)["status"] == "not timed"
    assert results.entry(model)["error"] == "selective_scan bfloat16 (1, 2): wrong: off by 1"
    assert results.entry(fine)["status"] == "done"
    name, given, _ = worker.asked[2]
    assert name == "time_scan" and given["refused"] == {"triton": results.entry(model)["error"]}


def test_a_refused_kernel_is_left_out_and_its_peers_are_timed(bench):
    for function, shape in (
        ("time_scan", (1, 5, 8, 2)),
        ("time_conv", (1, 5, 8, 2)),
        ("time_tokens", (1, 5, 4)),
    ):
        more = {"compiler": "eager"} if function == "time_tokens" else {}
        found = bench.gpu_functions.FUNCTIONS[function](
            shape, "float32", 1, {"torch": "it is wrong"}, **more, device="cpu"
        )
        assert "torch" not in found["milliseconds"]["forward"] and found["milliseconds"]["forward"]
        assert found["not_timed"]["torch"] == "it is wrong"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "was not written by gpu.py"),
        ('{"dry_run": true, "runs": [], "stages": {}}', "holds a dry run, this would be measurements"),
        ('{"dry_run": false, "runs": [{"hardware": "another"}], "stages": {}}', "of another, this is a card"),
    ],
)
def test_a_file_of_something_else_is_left_alone(bench, tmp_path, content, message):
    target = tmp_path / "gpu.json"
    target.write_text(content)
    with pytest.raises(SystemExit, match=message) as stop:
        bench.gpu_results.Results(target, RUN, False)
    assert "--output" in stop.value.code and "\n" not in stop.value.code
    assert target.read_text() == content


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no GPU"), (["--stage", "peer"], "invalid choice"), (["--budget", "0"], "positive number"),
        (["--dry-run", "--only", "nothing like it"], "no measurement's name contains it"),
        (["--table", "--output", "nowhere.json"], "there is no nowhere.json"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused(bench, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit) as stop:
        bench.gpu.main()
    assert message in f"{stop.value.code}{capsys.readouterr().err}"


def test_sources_change_with_a_kernel(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.gpu_results, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "scan.cpp"
    seen = set()
    for text in ("one", "two"):
        file.write_text(text)
        seen.add(bench.gpu_results.sources("kernels"))
    file.rename(file.with_name("other.cpp"))
    seen.add(bench.gpu_results.sources("kernels"))
    assert len(seen) == 3
    for name in (*bench.gpu_results.KERNELS, *bench.gpu_results.CODE):
        assert (ROOT / name).exists()


def command(*words):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", [("peers",), ("determinism",), ("published",), ("steps", "sizes", "families")], ids="-".join
)
def test_the_plan_runs_on_a_cpu(bench, tmp_path, stages):
    target, stages = tmp_path / "gpu.json", ("kernels", *stages)
    made = command("--dry-run", "--stage", *stages, "--output", str(target))
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    stored = json.loads(target.read_text())
    assert stored["dry_run"] and stored["runs"][0]["versions"]["torch"] == torch.__version__
    planned = [m for m in bench.gpu_plan.plan(True) if m.stage in stages]
    for stage in stages:
        assert {m.name for m in planned if m.stage == stage} == set(stored["stages"][stage])
        assert all(entry["status"] == "done" for entry in stored["stages"][stage].values())
    results, worker = bench.gpu_results.Results(target, stored["runs"][0], True), Scripted()
    assert bench.gpu.run(planned, planned, results, worker, options()) == [] and not worker.asked
    text = bench.gpu_table.table(stored)
    assert "the numbers mean nothing" in text
    for stage in stages:
        title = bench.gpu_plan.STAGES[stage]
        assert f"### {title[0].upper()}{title[1:]}" in text
    tables = [lines.splitlines() for lines in text.split("\n\n") if lines.startswith("|")]
    assert len(tables) >= len(stages)
    for lines in tables:
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
