"""A process that has imported everything and forks the processes of a run: a launch costs milliseconds.

``python -m tests.engine.forks`` reads one JSON line ``{"call": name, "arguments": [...]}`` at a time, calls that
function of tests/engine/scenarios.py and answers with one. It computes nothing itself, so that it stays without
threads and may fork.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Server:
    """The test's side."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.forks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip

    def __call__(self, name, *arguments):
        request = {"call": name, "arguments": [str(a) if isinstance(a, Path) else a for a in arguments]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer.get("error")
        return answer["result"]

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def fork(works, port):
    """One child per entry of ``works``, the ranks of one launch; their pids."""
    children = []
    for rank, work in enumerate(works):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(2, 1)
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(works)),
                    LOCAL_WORLD_SIZE=str(len(works)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
                if len(works) == 1:
                    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                        del os.environ[name]
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def join(children, seconds=60):
    """Exit codes; a child that does not end in time is killed and counts as -9."""
    codes = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[child] for child in children]


def serve():
    from tests.engine import scenarios

    scenarios.warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(scenarios, request["call"])(*request["arguments"])}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
