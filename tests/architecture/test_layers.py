"""Imports point down, or stay in their layer without circles, between files too; docs/architecture.md has the table."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _layers() -> dict[int, list[str]]:
    """The rows of the page's table: layer -> modules, in the backticks of the second column."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE)
    return {int(layer): re.findall(r"`([\w.]+)`", modules) for layer, modules in rows}


LAYERS = _layers()
# Inside layer 1, whose parts are usable alone.
BELOW = {"dis_mamba": ("dis_kernels", "dis_causal_conv1d"), "dis_causal_conv1d": ("dis_kernels",)}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

# What the registry of solvers imports of those that are built on it.
STANDING = {"zigflow.samplers.torchdiffeq_adapter"}
OPTIONAL = {
    "triton", "mamba_ssm", "selective_scan_cuda", "causal_conv1d", "diffusers", "transformers", "wandb", "webdataset",
    "av", "torchmetrics", "torch_fidelity", "tensorboard", "gradio",
}  # fmt: skip
ENTRY_IMPORTS = {
    "os",
    "pathlib",
    "sys",
    "hydra",
    "omegaconf",
    "zigflow.errors",
    "zigflow.plugins",
    "zigflow.paths",
    "zigflow.typed_arguments",
    "zigflow.typed_plugins",
    "zigflow.hydra_folders",
    "zigflow.hydra_run",
    "zigflow.command_help",
    "scans",
    "zigflow.cli",
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("tests", "benchmarks", "docs", "build") or any(
            p.startswith(".") for p in relative.parts
        ):
            continue
        parts = list(relative.with_suffix("").parts)
        if parts[0] == "datasets":
            parts = ["zigflow", *parts]
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = _modules()


def _component(module: str) -> str | None:
    """The row of the table that a module belongs to."""
    for name in sorted(LAYER_OF, key=len, reverse=True):
        if module == name or module.startswith(name + "."):
            return name
    return None


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imports(module: str, top_level_only: bool = False) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = _tree(module)
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names
            }
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_a_layer_and_imports_point_down(module):
    if module == "zigflow":
        return
    own = _component(module)
    assert own, f"{module} is in no layer of the table"
    for imported in _imports(module):
        other = _component(imported)
        if other is None or other == own:
            continue
        assert LAYER_OF[other] <= LAYER_OF[own], f"{module} (layer {LAYER_OF[own]}) imports {imported}"
        if LAYER_OF[own] == 1:
            assert other in BELOW.get(own, ()), f"{module} imports {imported}"


def test_components_of_a_layer_do_not_import_in_cycles():
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        own = _component(module)
        if own:
            targets = {_component(i) for i in _imports(module)} - {None, own}
            edges.setdefault(own, set()).update(t for t in targets if LAYER_OF[t] == LAYER_OF[own])

    def visit(node, trail):
        assert node not in trail, f"cycle: {' -> '.join([*trail, node])}"
        for target in edges.get(node, ()):
            visit(target, [*trail, node])

    for node in edges:
        visit(node, [])


def _names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _circle(imports: dict[str, set[str]]) -> list[str]:
    """Files that import each other, inside of functions too, the first one twice; empty without any."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(imports.get(module, set()) - {module}):
            if found := visit(target, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


def test_files_do_not_import_each_other_in_circles():
    library = {module: {i for i in _imports(module) if i in MODULES} for module in MODULES}
    library["zigflow.samplers.solver"] -= STANDING
    assert not (circle := _circle(library)), " -> ".join(circle)


def test_benchmarks_do_not_import_each_other_in_circles():
    # Scripts find those of their folder both as benchmarks.NAME and as NAME.
    scripts = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    imports = {
        name: {i.removeprefix("benchmarks.") for i in _names(path)} & set(scripts)
        for name, path in scripts.items()
    }
    assert any(imports.values())
    assert not (circle := _circle(imports)), " -> ".join(circle)


def test_a_circle_is_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_table_names_what_exists_and_nothing_twice():
    assert sorted(LAYERS) == [1, 2, 3, 4, 5, 6]
    named = [name for names in LAYERS.values() for name in names]
    assert len(named) == len(set(named))
    assert not [n for n in named if n not in MODULES and not any(m.startswith(f"{n}.") for m in MODULES)]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if _component(m)))
def test_frameworks_stay_in_their_layers(module):
    layer = LAYER_OF[_component(module)]
    roots = {i.partition(".")[0] for i in _imports(module)}
    if layer < 5:
        allowed = {"omegaconf"} if _component(module) == "zigflow.official" else set()
        assert not (roots & {"hydra", "omegaconf"}) - allowed, module
    if layer < 4:
        assert "accelerate" not in roots, module
    if module.startswith("scans"):
        assert "torch" not in roots, module
    assert "datasets" not in roots, f"{module}: import zigflow.datasets"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_optional_packages_are_imported_at_use(module):
    roots = {i.partition(".")[0] for i in _imports(module, top_level_only=True)}
    # Triton compiles module-level functions alone, so its kernels have modules of their own, imported at use.
    kernels = (".triton_kernels", ".triton_backward")
    allowed = {"triton"} if module.endswith(kernels) else set()
    assert not (roots & OPTIONAL) - allowed, f"{module} imports {roots & OPTIONAL} when it is itself imported"


@pytest.mark.parametrize("module", ["train_acc", "sample_acc", "zigflow.cli"])
def test_entries_import_nothing_heavy(module):
    for imported in _imports(module, top_level_only=True):
        assert imported in ENTRY_IMPORTS or imported in ("collections.abc", "zigflow"), (
            f"{module} imports {imported}"
        )


def test_file_sizes():
    # A file ends where its subject ends; one that outgrows this has two.
    limits = {"train_acc": 60, "sample_acc": 60}
    for module, path in MODULES.items():
        limit = limits.get(module, 600)
        lines = len(path.read_text().splitlines())
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, {limit} allowed"


def test_folders_that_must_not_be_packages():
    assert not (ROOT / "datasets" / "__init__.py").exists(), "it would shadow the Hugging Face library"
    assert not (ROOT / "config" / "__init__.py").exists()
    assert not list((ROOT / "config").rglob("*.py"))
    assert not (ROOT / "zigflow" / "utils").exists()


def test_every_package_is_listed_for_the_wheel():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = {m for m, p in MODULES.items() if p.name == "__init__.py"} | {
        "zigflow.datasets",
        "zigflow.config",
    }
    assert packages == listed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_print_and_no_bare_pickle(module):
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print":
                assert module.startswith("zigflow.tools"), f"{module}:{node.lineno} prints"
            assert name not in ("pickle.load", "pickle.loads", "pickle.dump", "torch.save"), (
                f"{module}:{node.lineno}"
            )
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{module}:{node.lineno}"
