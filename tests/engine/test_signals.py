"""SIGTERM, SIGUSR1 and Ctrl-C in every window of a run: what is done is saved, the run that continues is the same."""

import os
import signal

import pytest
import torch
from omegaconf import OmegaConf

from tests.engine.toys import Loader, TinyModel, ToyProcess, assert_same_bits, make_trainer, snapshot
from zigflow import cli, files
from zigflow.engine import checkpoint, exits, signals
from zigflow.engine.signals import SIGNALS, Stopped, StopSignals, stop
from zigflow.settings import SettingsError

STEPS = 5


@pytest.fixture(autouse=True)
def _handlers():
    with stop.installed():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path_factory.mktemp("unbroken"), steps=STEPS)
    trainer.fit()
    return snapshot(trainer)


def send(number):
    os.kill(os.getpid(), number)


class Once:
    """Sends the signal at its ``at``-th call."""

    def __init__(self, number, at=1):
        self.number, self.at, self.calls = number, at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            send(self.number)


class Compiling(TinyModel):
    """The first forward pass, in which torch would compile, is interrupted."""

    def __init__(self, interrupt):
        super().__init__()
        self.interrupt = interrupt

    def forward(self, *args, **kwargs):
        self.interrupt()
        return super().forward(*args, **kwargs)


class Interrupted(ToyProcess):
    def __init__(self, interrupt):
        super().__init__()
        self.interrupt = interrupt

    def loss(self, *args, **kwargs):
        self.interrupt()
        return super().loss(*args, **kwargs)


class WaitingLoader(Loader):
    def __init__(self, interrupt):
        super().__init__()
        self.interrupt = interrupt

    def _run(self, start):
        for batch in super()._run(start):
            self.interrupt()
            yield batch


def in_evaluation(interrupt):
    """A hook of several batches, as an evaluation is; it gives up without a result when asked to stop."""
    results = []

    def hook(trainer, record):
        for batch in range(4):
            if batch == 2:
                interrupt()
            if trainer.should_stop():
                return
        results.append(record.step)

    hook.results = results
    return hook


def continued(folder, unbroken, seed=8):
    """The rest of the run; its weights come from the checkpoint unless it starts anew, with the first seed."""
    stop.reset()
    torch.manual_seed(4321)
    again = make_trainer(folder, steps=STEPS, model=TinyModel(seed=seed))
    again.fit()
    assert again.stopped_by is None
    assert_same_bits(snapshot(again), unbroken)
    return again.data.loader.starts


WINDOWS = {
    "compilation": (1, lambda once: {"model": Compiling(once), "compile": False}),
    "first step": (1, lambda once: {"process": Interrupted(once)}),
    "first data": (1, lambda once: {"loader": WaitingLoader(once)}),
    "later data": (3, lambda once: {"loader": WaitingLoader(once)}),
    "later step": (3, lambda once: {"process": Interrupted(once)}),
    "evaluation": (3, lambda once: {"hooks": [in_evaluation(once)]}),
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("window", WINDOWS)
def test_it_saves_and_leaves(tmp_path, unbroken, window, number):
    step, changes = WINDOWS[window]
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, steps=STEPS, **changes(Once(number, at=step)))
    assert trainer.fit().step == step
    assert trainer.stopped_by == number.name
    assert checkpoint.open_checkpoint(tmp_path).step == step
    if window == "evaluation":
        assert trainer.monitoring.hooks[0].function.results == [1, 2], (
            "the interrupted evaluation must give no result"
        )
    assert continued(tmp_path, unbroken) == [step]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_before_the_first_step_there_is_nothing_to_save(tmp_path, unbroken, number):
    class Late(Loader):
        def __call__(self, start):
            send(number)
            return super().__call__(start)

    trainer = make_trainer(tmp_path, steps=STEPS, loader=Late())
    assert trainer.fit().step == 0
    assert trainer.stopped_by == number.name
    assert trainer.data.loader.given == [], "no data is read any more"
    assert checkpoint.find_latest(tmp_path) is None
    assert continued(tmp_path, unbroken, seed=0) == [0]


def test_before_the_first_step_of_a_run_that_continues_its_checkpoint_stays(tmp_path, unbroken):
    torch.manual_seed(0)
    make_trainer(tmp_path, steps=2).fit()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*"))
    stop.wait()
    send(signal.SIGTERM)
    trainer = make_trainer(tmp_path, steps=STEPS)
    assert trainer.fit().step == 2
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*")) == before
    assert continued(tmp_path, unbroken) == [2]


def save_operations(folder):
    """What a run of two steps that saves each does in its second save, the deletion of the first included."""
    seen = []
    with files.observed(lambda operation, path: seen.append((operation, path))):
        make_trainer(folder, steps=2, ckpt_every=1, keep_last=1).fit()
    first = next(i for i, (_, path) in enumerate(seen) if path.name == ".incomplete-step-0000002")
    return first, len(seen)


@pytest.mark.slow
def test_a_save_ends_before_the_run_leaves_at_whichever_operation_the_signal_comes(tmp_path, unbroken):
    first, end = save_operations(tmp_path / "counted")
    assert end - first > 40
    for index in range(first, end):
        stop.reset()
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / str(index), steps=STEPS, ckpt_every=1, keep_last=1)
        once = Once(SIGNALS[index % 2], at=index + 1)
        with files.observed(once):
            trainer.fit()
        assert trainer.stopped_by == SIGNALS[index % 2].name
        assert [c.step for c in checkpoint.list_complete(tmp_path / str(index) / "checkpoints")] == [2]
        assert not list((tmp_path / str(index) / "checkpoints").glob(".*"))
    assert continued(tmp_path / str(index), unbroken) == [2]


def test_more_signals_change_nothing(tmp_path, unbroken):
    def storm(operation, path):
        for number in SIGNALS:
            send(number)

    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, steps=STEPS, hooks=[lambda t, r: send(signal.SIGTERM) if r.step == 2 else None]
    )
    with files.observed(storm):
        trainer.fit()
    # The first operation is the making of the run directory.
    assert trainer.counters.step == 0
    stop.reset()
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, steps=STEPS, hooks=[lambda t, r: send(signal.SIGTERM) if r.step == 2 else None]
    )
    saving = []

    def storm_in_save(operation, path):
        if "step-0000002" in str(path):
            saving.append(operation)
            storm(operation, path)

    with files.observed(storm_in_save):
        trainer.fit()
    assert len(saving) > 20
    assert trainer.stopped_by == "SIGTERM", "the first one counts"
    assert continued(tmp_path, unbroken) == [2]


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path, unbroken):
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, steps=STEPS, hooks=[lambda t, r: send(signal.SIGUSR1) if r.step == STEPS else None]
    )
    assert trainer.fit().step == STEPS
    assert trainer.stopped_by is None, "the run is done"
    assert_same_bits(snapshot(trainer), unbroken)


def test_while_building_it_leaves_on_the_spot():
    with pytest.raises(Stopped, match="SIGUSR1 before training began"):
        send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert stop.received == "SIGUSR1", "a second signal does not interrupt what the first one started"


@pytest.mark.parametrize("window", ["later data", "later step", "evaluation"])
def test_ctrl_c_saves_and_leaves(tmp_path, unbroken, window):
    step, changes = WINDOWS[window]
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, steps=STEPS, **changes(Once(signal.SIGINT, at=step)))
    assert trainer.fit().step == step
    assert (trainer.stopped_by, stop.code) == ("SIGINT", exits.INTERRUPTED)
    assert checkpoint.open_checkpoint(tmp_path).step == step
    assert continued(tmp_path, unbroken) == [step]
    assert stop.code == exits.STOPPED


def test_ctrl_c_in_a_save_lets_it_end(tmp_path, unbroken):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, steps=STEPS, ckpt_every=2)
    pressed = []

    def press(operation, path):
        if "step-0000002" in str(path) and not pressed:
            pressed.append(operation)
            send(signal.SIGINT)

    with files.observed(press):
        trainer.fit()
    assert (pressed != [], trainer.stopped_by) == (True, "SIGINT")
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert continued(tmp_path, unbroken) == [2]


def of_a_run(monkeypatch, *, launched):
    """Handlers whose process does not end, a clock, and what they said."""
    monkeypatch.setenv("RANK", "0") if launched else monkeypatch.delenv("RANK", raising=False)
    clock, left = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    return StopSignals(leave=left.append), clock, left


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once(monkeypatch, first):
    handlers, _, left = of_a_run(monkeypatch, launched=False)
    handlers.hold()
    handlers._handle(first, None)
    assert left == []
    handlers._handle(signal.SIGINT, None)
    if first == signal.SIGTERM:
        assert left == [], "the first Ctrl-C"
        handlers._handle(signal.SIGINT, None)
    assert len(left) == 1 and "stopped by a second SIGINT" in left[0]
    assert handlers.code == exits.INTERRUPTED


def test_what_a_launcher_passes_on_is_the_same_press(monkeypatch):
    handlers, clock, left = of_a_run(monkeypatch, launched=True)
    handlers.hold()
    for _ in range(3):
        handlers._handle(signal.SIGINT, None)
    assert (handlers.received, left) == ("SIGINT", [])
    clock[0] += 3
    handlers._handle(signal.SIGINT, None)
    assert len(left) == 1


def test_ctrl_c_while_building_or_compiling_leaves_at_once(monkeypatch):
    handlers, _, left = of_a_run(monkeypatch, launched=False)
    with pytest.raises(Stopped, match="stopped by SIGINT before training began"):
        handlers._handle(signal.SIGINT, None)
    handlers.reset()
    handlers.wait()
    handlers._handle(signal.SIGINT, None)
    assert left == ["stopped by SIGINT before the first step had ended; there was nothing to save"]


def test_each_job_of_a_sweep_is_built_in_a_window_of_its_own(monkeypatch):
    handlers, _, left = of_a_run(monkeypatch, launched=False)
    handlers.hold()
    handlers.build()
    with pytest.raises(Stopped, match="stopped by SIGINT before training began"):
        handlers._handle(signal.SIGINT, None)
    with pytest.raises(Stopped, match="SIGINT"):
        handlers.build()
    assert (handlers.received, left) == ("SIGINT", [])


def test_a_job_begins_in_the_window_of_building(monkeypatch):
    def hydra_folder(cfg):
        raise SettingsError(stop._window)

    monkeypatch.setattr(cli.hydra_folders, "one_folder", hydra_folder)
    stop.hold()
    kept = []
    cli._Job("sample", kept)(OmegaConf.create({"run_dir": "r"}))
    assert [str(error) for error, _ in kept] == ["building"]


def test_a_process_that_is_leaving_after_ctrl_c_can_still_be_ended():
    stop.hold()
    send(signal.SIGINT)
    stop.ignore()
    assert signal.getsignal(signal.SIGINT) == stop._handle
    stop.reset()
    stop.ignore()
    assert all(signal.getsignal(n) == signal.SIG_IGN for n in (*SIGNALS, signal.SIGINT))


def test_no_handler_of_errors_swallows_the_stop():
    assert not issubclass(Stopped, Exception)


def test_a_first_step_that_does_not_end_is_left():
    left = []
    signals_of_a_run = StopSignals(patience=0.01, leave=left.append)
    signals_of_a_run.wait()
    signals_of_a_run._handle(signal.SIGTERM, None)
    signals_of_a_run._timer.join(30)
    assert len(left) == 1
    assert "stopped by SIGTERM: the first step had not ended" in left[0]


def test_a_first_step_that_ends_in_time_is_not_left():
    left = []
    signals_of_a_run = StopSignals(patience=0.05, leave=left.append)
    signals_of_a_run.wait()
    signals_of_a_run._handle(signal.SIGTERM, None)
    timer = signals_of_a_run._timer
    signals_of_a_run.hold()
    timer.join(30)
    assert left == []


def test_a_forked_process_has_the_default_handlers():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        right = all(signal.getsignal(n) == signal.SIG_DFL for n in SIGNALS)
        # The terminal's Ctrl-C goes to data workers as well: the step that is to be saved needs them.
        right &= signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        os.write(writing, b"." if right else b"x")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.read(reading, 1) == b"."
    os.close(reading)
    os.close(writing)


def test_all_ranks_leave_when_one_is_asked(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=STEPS)
    real = trainer.ranks.sum

    def another_rank_has_it(values):
        # Only should_stop() agrees on two numbers.
        return [0.0, 1.0] if len(values) == 2 and trainer.counters.step == 2 else real(values)

    monkeypatch.setattr(trainer.ranks, "sum", another_rank_has_it)
    trainer.fit()
    assert (trainer.counters.step, trainer.stopped_by) == (2, "a signal to another process")
    assert signals.stop.received is None
    assert checkpoint.open_checkpoint(tmp_path).step == 2
