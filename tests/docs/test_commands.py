"""Every command of every page is run, composed or parsed; one that nothing checks is listed with a reason."""

import importlib
import re
from dataclasses import replace

import pytest

from tests.docs.commands import PAGES, ROOT, Command, UncheckedError, check, commands_of

# Pages whose commands a module of their own holds against what they stand for, and how it calls them.
OWN_TESTS = {
    "docs/extending.md": ("tests.docs.test_extending", "COMMANDS"),
    "docs/formats.md": ("tests.docs.test_formats", "COMMANDS"),
    "docs/migration.md": ("tests.docs.test_migration", "OURS"),
    "docs/migration_dim.md": ("tests.docs.test_migration_dim", "OURS"),
    "docs/migration_dis.md": ("tests.test_dis_commands", "OURS"),
    "docs/migration_dit.md": ("tests.docs.test_migration_transformers", "OURS"),
    "docs/migration_uvit.md": ("tests.docs.test_migration_transformers", "OURS"),
}
ALL = [command for page in PAGES for command in commands_of(page)]
CHECKED = [c for c in ALL if c.page not in OWN_TESTS or c.inline]
REASONS = {
    "pip install ninja packaging": "two build tools of others",
    "pip install --no-build-isolation --no-deps mamba-ssm": "another project's package",
    "wandb login": "another project's command",
    "wandb sync --append": "another project's command",
    "python train_acc.py data.bath_size=3": "the mistake that the README shows; run in tests/config/test_config.py",
    "pip install -r requirements.txt": "another project's column",
    "pip install -e causal_conv1d": "another project's column",
    "accelerate launch --num_processes 2 ... sample_acc.py ckpt=RUN_DIR": "the dots stand for a launch file",
}  # fmt: skip


def test_there_is_something_to_test():
    assert len(ALL) > 180
    assert {c.page for c in ALL} >= {"README.md", "CONTRIBUTING.md", "docs/data.md", *OWN_TESTS}
    assert sum("data.order=streaming" in c.line for c in ALL) >= 1


@pytest.mark.parametrize("command", [c for c in CHECKED if c.line not in REASONS], ids=str)
def test_the_command_is_accepted(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(command)
    signed = re.sub(r"(?<= )(experiment|debug)=", r"+\1=", command.line)
    if signed != command.line:
        check(replace(command, line=signed))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_checked_is_a_command_of_today():
    assert set(REASONS) <= {c.line for c in CHECKED}


@pytest.mark.parametrize("page", OWN_TESTS)
def test_a_page_s_own_test_sees_each_of_its_commands(page):
    module, name = OWN_TESTS[page]
    seen = {line.strip() for line in getattr(importlib.import_module(module), name)}
    blocks = [c.line for c in commands_of(ROOT / page) if not c.inline]
    assert blocks
    assert set(blocks) <= seen


@pytest.mark.parametrize(
    "line",
    [
        "python train_acc.py data=shards data.source.root=https://host/train-{000000..000124}.tar",
        "python train_acc.py data.bath_size=3",
        "python sample_acc.py ckpt=x labels=[cat",
        "python -m zigflow.tools plot-scan",
        "python -m zigflow.tools plot-scans --hight 16",
        "python -m zigflow.tools count-flops model=zigzag8_b",
        "python benchmarks/loader.py --nonsense 3",
        "accelerate launch --config_file config/accelerate/gpu9.yaml train_acc.py",
        "accelerate launch --config_file config/accelerate/gpu8.yaml train_acc.py optim.lrr=1",
        "torchrun --nproc_per_node 2 train_acc.py experiment=nothing",
        "pip install 'zigflow[everything]'",
        "make everything",
        "zigflow-teach data=digits",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((Exception, SystemExit)) as refused:
        check(Command("page.md", line))
    assert not isinstance(refused.value, AssertionError)
    assert isinstance(refused.value, UncheckedError) == line.startswith("zigflow-teach")
