"""The reference pages are those that the declarations make; every variable that the code reads is declared."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from hydra.utils import get_object

from zigflow.command_help import keys_of
from zigflow.environment import VARIABLES
from zigflow.tools import docs_keys
from zigflow.tools.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("zigflow", "datasets", "scans", "dis_kernels", "dis_mamba", "dis_causal_conv1d")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "model_zigma.py", ROOT / "train_acc.py", ROOT / "sample_acc.py"]
# Capital words beside an environment that are no variables of it: signals, and names of the system.
WORDS = {"FOLDER", "RTLD_NOLOAD", "SC_PAGE_SIZE", "SC_PHYS_PAGES", "SIGINT", "SIGTERM", "SIGUSR1"}


@pytest.mark.parametrize("name", docs_keys.PAGES)
def test_the_page_is_up_to_date(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == docs_keys.pages()[name], "out of date: run python -m zigflow.tools docs-keys"


def test_the_comments_of_the_yaml_files_are_the_declarations():
    made = docs_keys.commented_files()
    assert sum(text.count(" # ") for text in made.values()) > 60
    stale = [str(path) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{stale} are out of date: run python -m zigflow.tools docs-keys"
    about = {"optim.lr": "the rate"}
    assert docs_keys._commented("lr: 1e-4 # old", "optim.", about) == "lr: 1e-4 # the rate"
    assert docs_keys._commented("lr: 1e-4", "optim.", about) == "lr: 1e-4"
    assert docs_keys._commented("# lr: 1e-4 # old", "optim.", about) == "# lr: 1e-4 # old"


def test_a_page_that_is_out_of_date_is_found(tmp_path, capsys):
    assert main(["docs-keys", "--output", str(tmp_path)]) == 0
    assert main(["docs-keys", "--output", str(tmp_path), "--check"]) == 0
    (tmp_path / "keys.md").write_text("# Keys\n")
    assert main(["docs-keys", "--output", str(tmp_path), "--check"]) == 1
    assert "keys.md out of date: run python -m zigflow.tools docs-keys" in capsys.readouterr().err


def test_every_key_and_every_argument_of_a_node_has_its_meaning():
    page = docs_keys.pages()["keys.md"]
    for key in keys_of("sample"):
        assert key.group or f"| `{key.path}` |" in page, key.path
    empty = re.findall(r"^\| `([\w.]+)` .*\|  \|$", page, flags=re.M)
    assert not empty, f"no docstring says what {empty} are"
    for group, node in docs_keys._NODES.items():
        for target in docs_keys._targets(group):
            for name in inspect.signature(get_object(target)).parameters:
                assert name in docs_keys.NO_KEYS or f"| `{node}.{name}` |" in page or name == "kwargs", name


def named_variables(tree):
    """Capital words among the texts of a module that reads the environment, and those that it reads by name."""
    if not any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(tree)):
        return set()
    exported = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    names = {n.value for node in exported for n in ast.walk(node) if isinstance(n, ast.Constant)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {
        text
        for text in texts - names
        if re.fullmatch(r"[A-Z][A-Z0-9]{2,}(_[A-Z0-9]+)*|[A-Z]\w*_[A-Z0-9_]+", text)
    }


def test_every_variable_that_is_read_is_declared_and_the_other_way_round():
    declared = {variable.name for variable in VARIABLES}
    assert len(declared) == len(VARIABLES)
    read, everywhere = set(), ""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if path.name != "environment.py":
            everywhere += text
            read |= named_variables(ast.parse(text))
    assert len(read) > 20
    assert read - WORDS <= declared, f"read and not declared: {sorted(read - WORDS - declared)}"
    unread = {name for name in declared if f'"{name}"' not in everywhere}
    # What doctor shows, and others read.
    assert unread <= {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_PORT"}
    yaml = "".join(path.read_text() for path in (ROOT / "config").rglob("*.yaml"))
    assert set(re.findall(r"oc\.env:(\w+)", yaml)) <= declared


def test_a_variable_that_nobody_declared_would_be_found():
    assert named_variables(ast.parse("import os\nx = os.environ.get('ZIGFLOW_NEW')")) == {"ZIGFLOW_NEW"}
    assert named_variables(ast.parse("import os\nx = os.getenv('ZIGFLOW_NEW')")) == {"ZIGFLOW_NEW"}
    assert named_variables(ast.parse("x = 'ZIGFLOW_NEW'")) == set()
