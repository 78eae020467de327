"""Which files of this project does a value pass on its way? Calls are traced, and files counted.

``python -m tests.architecture.trace_calls`` prints them, with ``--functions`` what they do there.

Four ways are walked by real commands on a tiny model, each followed by what the value is on it:

batch  a batch from the loader to the loss. The pixels that the data source hands to the loader are of a marked tensor
       type, which torch hands on to everything that is computed from them.
key    ``ode.num_steps`` from the command line to the solver: the text ``ode.num_steps=1237`` and the number 1237.
ckpt   ``ckpt=RUN`` to a model that samples: from the sampling job on, the path of the run and of its checkpoint, the
       opened checkpoint, stored weights, the model, until a sampling run has the model.
scan   a scan's name to the kernel: the name, what the scans package makes of it, walks, integer orders, until the
       model's forward pass is over.

A frame *has* the value when one of its arguments is the value, or a list, tuple, mapping or batch that holds it
directly, or when it returns such. A file is **on the way** when one of its functions has the value, or leads to one
that has: it lies on the stack between such a frame and the frame that all of them have in common, which is counted
too. That is what a reader has to open who follows the value. A file that is merely called on the way (the keyed draws,
a check of other keys) does not count, and neither does one that holds the configuration as a whole and does not touch
the value. The network counts as the file of its class and is not followed, except on the way of a scan, which goes
through it: which network it is changes by the configuration. Nothing is counted twice.
"""

import argparse
import contextlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zigflow

ROOT = Path(zigflow.__file__).resolve().parents[1]
NUM_STEPS = 1237
GRID = 6
SCAN = "zigzagN8"
_HERE = Path(__file__).resolve()
TINY = (
    "data=digits", "model=digits_zigzag8", "metrics=none", "+debug=cpu_tiny", "loop.device=cpu", "data.train_steps=1",
    "ckpt_every=1",
)  # fmt: skip


class Reached(BaseException):
    """The end of the way: what comes after it need not run."""


class Marked(Tensor):
    """A tensor whose kind passes on to all that is computed from it."""


def project_file(frame: FrameType) -> str | None:
    """The file of this project that a frame belongs to; None for others, and while a module is imported."""
    code = frame.f_code
    if code.co_name == "<module>":
        return None
    found = _FILES.get(code.co_filename)
    if found is None:
        path = Path(code.co_filename)
        inside = path.is_absolute() and path.is_relative_to(ROOT) and path != _HERE
        top = path.relative_to(ROOT).parts[0] if inside else "tests"
        found = "" if top in ("tests", ".venv", "build") else str(path.relative_to(ROOT))
        _FILES[code.co_filename] = found
    return found or None


_FILES: dict[str, str] = {}


class Tracer:
    """Follows one value through calls, from :meth:`begin` on; the ``with`` block ends it.

    Args:
        has: whether an object is the value.
        ends: whether the way ends with this event, "call" or "return", of a frame.
        leaf: frames that are entered and not followed.
        aborts: end what runs at the end of the way.
    """

    def __init__(
        self,
        has: Callable[[Any], bool],
        ends: Callable[[str, FrameType], bool],
        leaf: Callable[[FrameType], bool] = lambda frame: False,
        aborts: bool = False,
    ):
        self._has, self._ends, self._leaf, self._aborts = has, ends, leaf, aborts
        self._stacks: list[list[tuple[int, FrameType]]] = []
        self._inside: FrameType | None = None
        self.reached = False

    def begin(self) -> None:
        """From here on; nothing changes when the way is over."""
        if not self.reached:
            sys.setprofile(self._event)

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> bool:
        sys.setprofile(None)
        return kind is Reached

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "return") or project_file(frame) is None:
            return
        if self._inside is not None:
            if event == "return" and frame is self._inside:
                self._inside = None
            return
        if event == "call":
            code = frame.f_code
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
            values = [frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals]
        else:
            values = [arg]
        if any(self._has(value) for value in values):
            self._stacks.append(_stack(frame))
        if event == "call" and self._leaf(frame):
            self._inside = frame
        if self._ends(event, frame):
            sys.setprofile(None)
            self.reached = True
            if self._aborts:
                raise Reached

    def stops(self) -> list[tuple[str, str]]:
        """(file, function) of every frame on the way, in the order of first entry."""
        if not self.reached or not self._stacks:
            raise RuntimeError(
                "the value did not come to the end of its way: the script no longer fits the code"
            )
        shared = min(len(stack) for stack in self._stacks)
        for depth in range(shared):
            if any(stack[depth][1] is not self._stacks[0][depth][1] for stack in self._stacks):
                shared = depth
                break
        found: dict[tuple[str, str], None] = {}
        for stack in self._stacks:
            for _, frame in stack[max(shared - 1, 0) :]:
                file = self._file(frame)
                if file is not None:
                    found.setdefault((file, frame.f_code.co_qualname))
        return list(found)

    def _file(self, frame: FrameType) -> str | None:
        if self._leaf(frame):
            return str(Path(inspect.getfile(type(frame.f_locals["self"]))).relative_to(ROOT))
        return project_file(frame)

    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.stops()))


def _stack(frame: FrameType | None) -> list[tuple[int, FrameType]]:
    """The project's frames from the outermost to this one, kept so that none is taken for another."""
    found = []
    while frame is not None:
        if project_file(frame) is not None:
            found.append((id(frame), frame))
        frame = frame.f_back
    return found[::-1]


def _directly(value: Any) -> Iterator[Any]:
    """The value, and what a list, tuple or mapping holds."""
    yield value
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def _has_batch(value: Any) -> bool:
    if type(value).__name__ == "Batch":
        return any(isinstance(part, Marked) for part in vars(value).values())
    # Samples are mappings in a list.
    return any(isinstance(part, Marked) for inner in _directly(value) for part in _directly(inner))


def _has_steps(value: Any) -> bool:
    for part in _directly(value):
        if type(part) in (int, float) and part == NUM_STEPS:
            return True
        if isinstance(part, str) and (part == str(NUM_STEPS) or f"num_steps={NUM_STEPS}" in part):
            return True
    return False


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module) and hasattr(value, "in_channels") and hasattr(value, "num_classes")


def _has_checkpoint(run_dir: Path) -> Callable[[Any], bool]:
    def has(value: Any) -> bool:
        if isinstance(value, str | Path):
            text = str(value)
            return text == str(run_dir) or text.startswith(str(run_dir / "checkpoints"))
        if type(value).__name__ == "Checkpoint" or _is_model(value):
            return True
        return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())

    return has


def _has_scan(value: Any) -> bool:
    for part in _directly(value):
        if isinstance(part, str) and part == SCAN:
            return True
        if type(part).__module__.partition(".")[0] == "scans" or type(part).__name__ == "Walk":
            return True
        whole = getattr(part, "dtype", None) is not None and "int" in str(part.dtype)
        if whole and part.shape and part.shape[-1] % (GRID * GRID) == 0 and part.shape[-1]:
            return True
    return False


def _named(name: str, folder: str = "") -> Callable[[FrameType], bool]:
    return lambda frame: frame.f_code.co_name == name and folder in frame.f_code.co_filename


def _enters_model(frame: FrameType) -> bool:
    return frame.f_code.co_name == "forward" and _of_model(frame)


def _of_model(frame: FrameType) -> bool:
    """Whether this is a method of a network, also while it is made."""
    own = frame.f_locals.get("self")
    if not isinstance(own, nn.Module):
        return False
    return type(own).__name__ == "ZigMa" or _is_model(own)


@contextlib.contextmanager
def _marked_pixels(tracer: Tracer) -> Iterator[None]:
    """A hundred images in place of the digits, whose package takes long to import; their pixels are marked.

    The tracer begins when the loader asks for samples of the first step: before, one is read to see its shape.
    """
    from unittest.mock import patch

    from zigflow.data.loader import PositionDataset
    from zigflow.datasets import digits
    from zigflow.datasets.shards import ShardSource

    numbers = np.arange(100)
    images = np.broadcast_to(numbers[:, None, None], (100, 8, 8)).astype(np.uint8)
    item, items = ShardSource.__getitem__, PositionDataset.__getitems__

    def marked(self, index):
        return {k: v.as_subclass(Marked) if k == "pixels" else v for k, v in item(self, index).items()}

    def asked(self, positions):
        tracer.begin()
        return items(self, positions)

    with (
        patch.object(digits, "load_digits", lambda: (images, numbers % 10)),
        patch.object(ShardSource, "__getitem__", marked),
        patch.object(PositionDataset, "__getitems__", asked),
    ):
        yield


def trace_batch(run_dir: Path) -> Tracer:
    """Train one step; also leaves the checkpoint that others open."""
    from zigflow import plugins
    from zigflow.train_job import train_from_config

    def ends(event: str, frame: FrameType) -> bool:
        return event == "return" and _named("loss", "processes")(frame)

    tracer = Tracer(_has_batch, ends, _of_model)
    data = f"data.source.root={run_dir.parent / 'digits'}"
    cfg = plugins.compose_config([*TINY, data, f"run_dir={run_dir}"])
    with _marked_pixels(tracer):
        train_from_config(cfg)
    return tracer


def trace_key(run_dir: Path) -> Tracer:
    """Sample from the command line."""
    from zigflow.cli import sample

    tracer = Tracer(_has_steps, lambda event, frame: _enters_model(frame), aborts=True)
    steps = [f"ode.num_steps={NUM_STEPS}", "ode.sampling_method=euler"]
    before, sys.argv = sys.argv, ["sample_acc.py", *_sampling(run_dir), *steps]
    try:
        with tracer:
            tracer.begin()
            sample()
    finally:
        sys.argv = before
    return tracer


def trace_checkpoint(run_dir: Path) -> Tracer:
    """Sample from a composed configuration."""
    from zigflow import plugins
    from zigflow.sample_job import sample_from_config

    def ends(event: str, frame: FrameType) -> bool:
        return event == "return" and frame.f_code.co_qualname == "SamplingRun.__init__"

    tracer = Tracer(_has_checkpoint(run_dir), ends, _of_model, aborts=True)
    cfg = plugins.compose_config(_sampling(run_dir), "sample")
    with tracer:
        tracer.begin()
        sample_from_config(cfg)
    return tracer


def _sampling(run_dir: Path) -> list[str]:
    folder = run_dir.parent / "samples"
    return [f"ckpt={run_dir}", "metrics=none", "num_fid_samples=2", "loop.device=cpu", f"sample_dir={folder}",
            f"run_dir={folder}", "sample_mode=ODE"]  # fmt: skip


def trace_scan(run_dir: Path) -> Tracer:
    from model_zigma import ZigMa

    def ends(event: str, frame: FrameType) -> bool:
        return event == "return" and _enters_model(frame)

    tracer = Tracer(_has_scan, ends)
    x, t = torch.zeros(1, 1, GRID, GRID), torch.zeros(1)
    with tracer:
        tracer.begin()
        model = ZigMa(1, 16, 1, GRID, 1, scan_type=SCAN, device="cpu")
        with torch.no_grad():
            model(x, t)
    return tracer


WAYS = {"batch": trace_batch, "key": trace_key, "ckpt": trace_checkpoint, "scan": trace_scan}


def trace_all() -> dict[str, list[tuple[str, str]]]:
    """The stops of every way, in the order of entry."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run_dir = Path(folder).resolve() / "run"
        return {name: walk(run_dir).stops() for name, walk in WAYS.items()}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description="Count the files on the way of a value.")
    options.add_argument("--json", type=Path, help="also write {way: [files]} here")
    options.add_argument("--functions", action="store_true", help="name the functions, too")
    return options


def main() -> None:
    args = parser().parse_args()
    found = trace_all()
    files = {way: list(dict.fromkeys(file for file, _ in stops)) for way, stops in found.items()}
    for way, stops in found.items():
        sys.stdout.write(f"{way}: {len(files[way])} files, {len(stops)} functions\n")
        for file in files[way]:
            names = [name for other, name in stops if other == file] if args.functions else []
            sys.stdout.write(f"  {file} {', '.join(names)}\n")
    if args.json:
        args.json.write_text(json.dumps(files, indent=1) + "\n")


if __name__ == "__main__":
    main()
