"""The file of gpu.py: what is known, what is to be measured again, and which kernels must not be timed.

    {"dry_run": false, "runs": [circumstances of a command, ...],
     "stages": {stage: {measurement: {"status", "seconds", "run", "code", "kernels", "result" or "error"}}}}

``run`` is an index into ``runs``; ``code`` and ``kernels`` are hashes of the sources that were measured.
"""

import hashlib
import json
from pathlib import Path

from machine import ROOT, publish

KERNELS = ("dis_kernels", "dis_causal_conv1d", "dis_mamba")
CODE = (*KERNELS, "scans", "zigflow", "model_zigma.py", "benchmarks")
FAILURES = ("wrong", "failed", "crashed", "timed out")


def sources(*names: str) -> str:
    """A hash of the Python and C++ files under these names."""
    made = hashlib.sha256()
    for name in names:
        root = ROOT / name
        paths = [root] if root.is_file() else sorted(root.rglob("*"))
        for path in paths:
            if path.suffix in (".py", ".cpp", ".h") and path.is_file():
                made.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return made.hexdigest()[:16]


class Results:
    """What a file holds and a run adds to it; the file is replaced as a whole after every measurement.

    Args:
        path: the file, which may be there already; None keeps everything in memory.
        run: circumstances of this command.
        dry: its values mean nothing.

    Raises:
        SystemExit: the file is not one of gpu.py, or of a dry run where this is none, or of other hardware.
    """

    def __init__(self, path: Path | None, run: dict, dry: bool):
        self.path = path
        self.data = {"dry_run": dry, "runs": [], "stages": {}} if path is None else read(path, dry)
        there = {each["hardware"] for each in self.data["runs"]} - {run["hardware"]}
        if there:
            raise SystemExit(
                f"{path} holds results of {', '.join(sorted(there))}, this is {run['hardware']}: "
                "give another file with --output"
            )
        self.data["runs"].append(run)
        self.now = {"run": len(self.data["runs"]) - 1, "code": sources(*CODE), "kernels": sources(*KERNELS)}

    def entry(self, measurement) -> dict | None:
        return self.data["stages"].get(measurement.stage, {}).get(measurement.name)

    def record(self, measurement, said: dict) -> None:
        """Keep what a measurement said and store the file."""
        arguments = {k: v for k, v in measurement.arguments.items() if k != "compiler"}
        stage = self.data["stages"].setdefault(measurement.stage, {})
        stage[measurement.name] = {**said, **self.now, "arguments": arguments}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            publish(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")

    def settled(self, measurement) -> bool:
        """Nothing new would be learned: a failure of the same code, a check of the same kernels, or a timing."""
        entry = self.entry(measurement)
        if entry is None or entry["status"] == "not timed":
            return False
        if entry["status"] != "done":
            return entry["code"] == self.now["code"]
        return measurement.stage != "kernels" or entry["kernels"] == self.now["kernels"]

    def stale(self, measurement) -> bool:
        """A result of other kernels than those that are here."""
        entry = self.entry(measurement)
        return entry is not None and entry["kernels"] != self.now["kernels"]

    def refusal(self, needed: tuple[str, str], checks) -> str | None:
        """Why kernels of an (operation, dtype) must not be timed, by the first stage; None when they are right.

        Args:
            checks: the measurements of that stage.
        """
        op, dtype = needed
        own = [m for m in checks if m.name.startswith(f"{op} {dtype} ")]
        open_ = [m for m in own if not self.settled(m)]
        bad = [m for m in own if m not in open_ and (self.entry(m) or {})["status"] in FAILURES]
        if bad:
            entry = self.entry(bad[0]) or {}
            why = entry.get("error") or "; ".join(entry["result"]["wrong"])
            return f"{bad[0].name}: {entry['status']}: {why}"
        if open_:
            return f"{len(open_)} of {len(own)} checks of {op} in {dtype} are to come: --stage kernels"
        return None


def read(path: Path, dry: bool) -> dict:
    """The content of a file of gpu.py, or a new one.

    Raises:
        SystemExit: see ``Results``.
    """
    if not path.exists():
        return {"dry_run": dry, "runs": [], "stages": {}}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}): give another file with --output") from None
    if not isinstance(data, dict) or not {"dry_run", "runs", "stages"} <= set(data):
        raise SystemExit(f"{path} was not written by gpu.py: give another file with --output")
    if data["dry_run"] != dry:
        kinds = ("a dry run", "measurements") if data["dry_run"] else ("measurements", "a dry run")
        raise SystemExit(
            f"{path} holds {kinds[0]}, this would be {kinds[1]}: give another file with --output"
        )
    return data
