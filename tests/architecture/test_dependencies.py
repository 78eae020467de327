"""What the source imports is declared, and what the project says of itself in several files agrees."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import metadata

import pytest
import yaml

from tests.architecture.test_layers import MODULES, ROOT
from zigflow import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {
    "zigflow",
    "scans",
    "dis_kernels",
    "dis_mamba",
    "dis_causal_conv1d",
    "model_zigma",
    "train_acc",
    "sample_acc",
    "datasets",
}
# What an import is called where the distribution has another name and may not be installed here.
DISTRIBUTION = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "omegaconf": "omegaconf",
    "hydra": "hydra-core",
    "hydra_plugins": "hydra-core",
    "mamba_ssm": "mamba-ssm",
    "selective_scan_cuda": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "causal_conv1d_cuda": "causal-conv1d",
}
# Parts of torch's own wheel on the platforms that have them.
WITH_TORCH = {"triton"}


# Reading what is installed takes half a second.
_installed = cache(metadata.packages_distributions)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared() -> set[str]:
    lines = [
        *PROJECT["dependencies"],
        *(d for extra in PROJECT["optional-dependencies"].values() for d in extra),
    ]
    return {_normal(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in lines}


def _third_party(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names} - OWN


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_import_is_of_a_declared_distribution(module):
    declared, installed = _declared(), _installed()
    for name in _third_party(MODULES[module]) - WITH_TORCH:
        names = [DISTRIBUTION[name]] if name in DISTRIBUTION else installed.get(name, [name])
        assert any(_normal(n) in declared for n in names), (
            f"{module} imports {name} ({', '.join(names)}), which pyproject.toml does not declare"
        )


def test_the_citation_has_the_release_number_and_the_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]


def test_hosted_jobs_run_the_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = []
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    assert {"make lint", "make test", "make test-slow", "make dist"} <= set(commands)
    assert {command.removeprefix("make ") for command in commands} <= targets


def test_issue_forms_have_what_a_form_needs():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for file in forms:
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= set(form)
        assert all(
            part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
            for part in form["body"]
        )
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))


def test_every_python_that_is_tested_is_classified():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = set(re.findall(r'"(3\.\d+)"', text))
    listed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert tested <= listed
