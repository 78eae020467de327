"""What the forking server does: runs of one and of several processes, killed, crashed, resumed."""

import importlib
import os
import random
import signal
import socket
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.engine.forks import fork, join
from tests.engine.toys import TinyModel, ToyProcess, batch_at, make_trainer, snapshot
from zigflow import files
from zigflow.data.global_batch import GlobalBatchSampler
from zigflow.engine import checkpoint
from zigflow.engine.elastic import global_batch_for
from zigflow.engine.ranks import Ranks
from zigflow.engine.tensors import save_tensors

GLOBAL = 8


def warm_up():
    """Have in memory what a first step would import: the compiler, which optimizers ask whether they are compiled."""
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()
    importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
    importlib.import_module("torch.nn.parallel.distributed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training(folder, steps, *, limit=GLOBAL, seed=0, note=None, dropout=0.3, hooks=(), **changes):
    """One rank of a run whose global batch is 8, on as many processes as have joined."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    ranks = Ranks()
    share = GLOBAL // ranks.size
    local = min(limit, share)
    batch = global_batch_for(Path(folder), local, share // local, ranks)

    def loader(start):
        return (batch_at(ids) for ids in GlobalBatchSampler(batch, start))

    def remember(trainer, record):
        seen.append((record.step, record.ids, record.times, record.losses))

    seen = []
    torch.manual_seed(seed)
    trainer = make_trainer(
        folder, steps=steps, loader=loader, batch_size=batch.local_size, grad_accum=batch.grad_accum,
        accelerator=accelerator, model=TinyModel(seed=seed, dropout=dropout), hooks=[remember, *hooks], **changes,
    )  # fmt: skip
    trainer.fit()
    if note is not None:
        tensors = {f"state/{k}": v for k, v in snapshot(trainer).items()}
        for step, ids, times, losses in seen:
            tensors |= {f"ids/{step}": ids, f"times/{step}": times, f"losses/{step}": losses}
        save_tensors(Path(f"{note}_rank{ranks.rank}.safetensors"), tensors)
    return trainer


def train(folder, steps, processes, note, options):
    """One launch that ends by itself; exit codes."""
    return join(fork([lambda: training(folder, steps, note=note, **options)] * processes, free_port()))


def kill(folder, steps, processes, after, options):
    """A launch killed with SIGKILL as soon as the checkpoint of step ``after`` is there; steps that are complete."""
    children = fork([lambda: training(folder, steps, **options)] * processes, free_port())
    target = Path(folder) / "checkpoints" / f"step-{after:07d}"
    deadline = time.monotonic() + 60
    while not target.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert join(children) == [-9] * processes
    return [c.step for c in checkpoint.list_complete(Path(folder) / "checkpoints")]


def random_kills(folder, count, seed):
    """A run that saves after every step, killed ``count`` times; what the kills hit, and how far it came."""
    draw = random.Random(seed)
    found = {
        "kills": 0,
        "in a save": 0,
        "in a deletion": 0,
        "before a new checkpoint": 0,
        "most steps lost": 0,
    }
    newest = 0
    folder = Path(folder)
    for number in range(count):
        reading, writing = os.pipe()

        def tell(trainer, record, writing=writing):
            os.write(writing, b".")

        options = {"ckpt_every": 1, "keep_last": 2, "log_every": 1, "hooks": [tell]}
        (child,) = fork([lambda options=options: training(folder, 10**6, **options)], 0)
        os.close(writing)
        if number % 4:
            # A few steps and saves from the end of the first step.
            os.read(reading, 1)
            time.sleep(draw.uniform(0.0, 0.1))
        else:
            # While it starts: opening, restoring, cleaning up.
            time.sleep(draw.uniform(0.01, 0.25))
        os.kill(child, signal.SIGKILL)
        assert join([child]) == [-9], "the run ended by itself"
        os.close(reading)
        found["kills"] += 1
        names = (
            [path.name for path in (folder / "checkpoints").glob(".*")] if newest or folder.exists() else []
        )
        found["in a save"] += any(name.startswith(".incomplete-") for name in names)
        found["in a deletion"] += any(name.startswith(".deleted-") for name in names)
        latest = checkpoint.find_latest(folder)
        if latest is None:
            assert newest == 0, "a checkpoint was lost"
            continue
        checkpoint.verify(latest.path)
        assert latest.step >= newest, f"from step {newest} back to {latest.step}"
        found["before a new checkpoint"] += latest.step == newest
        lines = (folder / "metrics.jsonl").read_text().count('"step"')
        found["most steps lost"] = max(found["most steps lost"], lines - latest.step)
        newest = latest.step
    return found | {"steps": newest}


def _crashing(index, count_only=None):
    """An observer that kills this process at its ``index``-th operation inside the second save."""
    seen = []

    def observer(operation, path):
        if not seen and path.name != ".incomplete-step-0000002" and "step-0000002" not in str(path):
            return
        seen.append((operation, str(path)))
        if count_only is not None:
            Path(count_only).write_text(f"{len(seen)}")
        elif len(seen) - 1 == index:
            os.kill(os.getpid(), signal.SIGKILL)

    return observer


def _saving(folder, steps, observer):
    with files.observed(observer):
        training(folder, steps, ckpt_every=1, keep_last=1)


def crash_everywhere(folder, rank):
    """Two gloo processes; the one of ``rank`` is killed at each operation of the second save and deletion in turn."""
    folder = Path(folder)
    idle = lambda *_: None  # noqa: E731
    observers = [idle, idle]
    observers[rank] = _crashing(0, count_only=folder / "count")
    assert join(fork([lambda o=o: _saving(folder / "counted", 2, o) for o in observers], free_port())) == [
        0,
        0,
    ]
    operations = int((folder / "count").read_text())
    outcomes = []
    for index in range(operations):
        run_dir = folder / str(index)
        observers[rank] = _crashing(index)
        codes = join(fork([lambda o=o: _saving(run_dir, 2, o) for o in observers], free_port()))
        assert codes[rank] == -9, f"operation {index}: {codes}"
        latest = checkpoint.find_latest(run_dir)
        assert latest is not None, f"operation {index} left no checkpoint"
        checkpoint.verify(latest.path)
        outcomes.append((codes[1 - rank], latest.step))
        codes = join(fork([lambda: _saving(run_dir, 3, idle)] * 2, free_port()))
        assert codes == [0, 0], f"after operation {index} the run does not continue: {codes}"
        names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert names == ["step-0000003"], names
    return outcomes


def poison(folder, processes, bad_rank):
    """A NaN loss of one sample of rank ``bad_rank`` in step 3; what each process said."""
    local = GLOBAL // processes
    sample = 2 * GLOBAL + bad_rank * local
    folder = Path(folder)

    def work():
        try:
            training(folder / "run", 6, ckpt_every=1, process=ToyProcess({sample: float("nan")}))
        except RuntimeError as error:
            (folder / f"said_{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")

    codes = join(fork([work] * processes, free_port()))
    said = [(folder / f"said_{rank}").read_text() for rank in range(processes)]
    return codes, said, checkpoint.open_checkpoint(folder / "run").step, sample


def signalled(folder, processes, only, number, at):
    """The process ``only`` gets a signal in step ``at``; (exit codes, step saved, what each was stopped by)."""
    from zigflow.engine.signals import stop

    folder = Path(folder)

    class Interrupted(ToyProcess):
        calls = 0

        def loss(self, *arguments, **keywords):
            self.calls += 1
            if self.calls == at and os.environ["RANK"] == str(only):
                os.kill(os.getpid(), number)
            return super().loss(*arguments, **keywords)

    def work():
        stop.install()
        trainer = training(folder / "run", 6, process=Interrupted())
        (folder / f"stopped_{os.environ['RANK']}").write_text(str(trainer.stopped_by))

    codes = join(fork([work] * processes, free_port()))
    said = [(folder / f"stopped_{rank}").read_text() for rank in range(processes)]
    return codes, checkpoint.open_checkpoint(folder / "run").step, said


def second_launch(folder, processes):
    """While one launch runs, a second one of the same directory; its errors, and whether the first ends well."""
    folder = Path(folder)

    def pause(trainer, record):
        deadline = time.monotonic() + 60
        while record.step == 2 and not (folder / "refused_0").exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    def first():
        training(folder / "run", 4, hooks=[pause])

    def second():
        try:
            training(folder / "run", 4)
        except RuntimeError as error:
            (folder / f"refused_{os.environ.get('RANK', '0')}").write_text(f"{type(error).__name__}: {error}")

    running = fork([first] * processes, free_port())
    while not (folder / "run" / "run.json").exists():
        time.sleep(0.002)
    refused = join(fork([second] * processes, free_port()))
    return join(running), refused, [(folder / f"refused_{r}").read_text() for r in range(processes)]
