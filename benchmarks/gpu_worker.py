"""The process in which gpu.py measures, and the parent's end of it.

A CUDA error makes every later call of its process fail, and a kernel may never return. So the parent asks the GPU
for its name and no more: a worker measures until something fails or takes too long, then a new one takes over.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180


def serve(connection, log: str, functions: str, device: str) -> None:
    """Answer requests until the parent hangs up: (name in ``functions``, keywords) -> {"status": ..., ...}.

    Args:
        log: file for all that this process prints.
        functions: module whose ``FUNCTIONS`` are the ones to call.
    """
    # A group of its own: Ctrl-C reaches the parent alone, which ends all of the group.
    os.setsid()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(target, stream)
    known = importlib.import_module(functions).FUNCTIONS
    connection.send("ready")
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        connection.send(answer(known[name], arguments, device))


def answer(function, arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """What a measurement found, or how it failed, as plain JSON values."""
    try:
        found = function(**arguments, device=device)
        torch = _torch()
        if torch is not None and torch.cuda.is_initialized():
            # An error of a kernel shows at the next call that waits: it belongs to this measurement.
            torch.cuda.synchronize()
        # What cannot be stored is an error of this measurement, too.
        json.dumps(found, allow_nan=False)
        said = {"status": "wrong" if found.get("wrong") else "done", "result": found}
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        said = {"status": "failed", "error": f"{kind}: {_line(error)}", "at": _places(error)}
        if kind == "OutOfMemoryError":
            said["status"] = "out of memory"
    gc.collect()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    torch = _torch()
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    return said


def _torch() -> Any:
    """Torch, if a measurement has imported it: it takes seconds, and not all need it."""
    return sys.modules.get("torch")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].replace(f"{ROOT}{os.sep}", "")


def _places(error: BaseException) -> list[str]:
    """The innermost calls, without paths of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{_shown(Path(f.filename))}:{f.lineno} in {f.name}" for f in frames]


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


class Worker:
    """A process that measures; started at the first request, and again after it was stopped."""

    def __init__(self, device: str, functions: str = "gpu_functions"):
        self.device, self.functions = device, functions
        self._process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        descriptor, self._log = tempfile.mkstemp(prefix="gpu-worker-", suffix=".log")
        os.close(descriptor)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, self._log, self.functions, self.device), daemon=True
        )
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        """End the process and all that it started."""
        process = self._process
        if process is None:
            return
        self._connection.close()
        with suppress(ProcessLookupError, PermissionError):
            if process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        self._process = None
        Path(self._log).unlink(missing_ok=True)

    def ask(self, name: str, arguments: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Measure, in at most ``seconds`` after the process has started; {"status": ..., "seconds": ..., ...}.

        Status "done", "wrong" (it ran, and the result is not right), "out of memory", "failed" (an exception),
        "crashed" (the process ended) or "timed out". After the last four the process is replaced.
        """
        fresh = self._process is None
        if fresh:
            self._start()
        if fresh:
            said = self._receive(START_SECONDS)
            if said != "ready":
                self.stop()
                return {**said, "error": f"while the process started: {said['error']}"}
        began = time.perf_counter()
        try:
            self._connection.send((name, arguments))
            said = self._receive(seconds)
        except (BrokenPipeError, ConnectionResetError):
            said = self._ended()
        said = {**said, "seconds": round(time.perf_counter() - began, 2)}
        if said["status"] not in ("done", "wrong"):
            self.stop()
        return said

    def _receive(self, seconds: float):
        try:
            if not self._connection.poll(max(0.0, seconds)):
                return {"status": "timed out", "error": f"no result after {seconds:.0f} s: stopped"}
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            return self._ended()

    def _ended(self) -> dict[str, Any]:
        process = self._process
        if process is not None:
            process.join(10)
        lines = (
            Path(self._log).read_text(errors="replace").replace(f"{ROOT}{os.sep}", "").strip().splitlines()
        )
        said = lines[-1][:300] if lines else "it said nothing"
        return {
            "status": "crashed",
            "error": f"the process ended with {_exit_of(None if process is None else process.exitcode)}: {said}",
        }


def _exit_of(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


if __name__ == "__main__":
    sys.exit("gpu_worker.py is a part of gpu.py: run that")
