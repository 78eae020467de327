"""The files on the way of a value do not become more than docs/architecture.md says."""

import json
import re
import subprocess
import sys

import pytest

from tests.architecture.test_layers import ROOT

# Real commands, run to be traced.
pytestmark = pytest.mark.slow

WAYS = ("batch", "key", "ckpt", "scan")


def documented() -> dict[str, int]:
    """{way: files now} of the table under "Ways"."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("\n## Ways\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \| (\d+) \|$", text, flags=re.MULTILINE)
    return {name: int(now) for name, _, now, _ in rows}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    # A process of its own: commands change the working directory, signals and hydra's state.
    file = tmp_path_factory.mktemp("ways") / "ways.json"
    command = [sys.executable, "-m", "tests.architecture.trace_calls", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("way", WAYS)
def test_a_way_passes_no_more_files_than_documented(way, traced):
    assert len(traced[way]) <= documented()[way], f"{way}: {', '.join(traced[way])}"


def test_what_a_way_cannot_do_without_is_on_it(traced):
    # A tracer that loses the value would count less, and pass.
    assert {"zigflow/data/loader.py", "zigflow/processes/flow.py", "model_zigma.py"} <= set(traced["batch"])
    assert {"zigflow/cli.py", "zigflow/samplers/ode.py"} <= set(traced["key"])
    assert "model_zigma.py" in traced["ckpt"] and any("sampling_run" in file for file in traced["ckpt"])
    assert {"scans/zigzag.py", "model_zigma.py"} <= set(traced["scan"])
    assert any(file.startswith("dis_kernels/tokenwise/") for file in traced["scan"])
