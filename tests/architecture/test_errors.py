"""One base class for errors, found by walking every class that the project defines."""

import errno
import importlib
import pickle
from pathlib import Path

import pytest

from tests.architecture.test_layers import MODULES
from zigflow import plugins
from zigflow.errors import MissingPackageError, SettingsError, ZigflowError, needs
from zigflow.files import StorageError

# Usable without zigflow, so with errors of their own.
ALONE = ("scans", "dis_kernels", "dis_mamba", "dis_causal_conv1d")
# Need Triton or Hydra's own start, and define no classes of errors.
NOT_IMPORTED = (".triton_kernels", ".triton_backward", "zigflow.tools.__main__")


def _below(base: type) -> list[type]:
    return [c for child in base.__subclasses__() for c in (child, *_below(child))]


def _own_errors() -> list[type[Exception]]:
    for module in sorted(MODULES):
        if not module.endswith(NOT_IMPORTED):
            importlib.import_module(module)
    return sorted({c for c in _below(Exception) if c.__module__ in MODULES}, key=lambda c: c.__qualname__)


def test_every_error_of_the_project_has_the_one_base():
    found = _own_errors()
    names = {error.__name__ for error in found}
    assert {"SettingsError", "ShardError", "CheckpointError", "UnknownNameError", "NativeError"} <= names
    for error in found:
        if error.__module__.partition(".")[0] in ALONE:
            assert not issubclass(error, ZigflowError), f"{error.__module__} must not need zigflow"
        else:
            assert issubclass(error, ZigflowError), (
                f"{error.__module__}.{error.__name__} does not inherit ZigflowError"
            )


def test_errors_cross_processes_with_their_message():
    # Torch's loader makes an error of a worker again from its message alone; a sweep's launcher pickles it.
    for error in (e for e in _own_errors() if issubclass(e, ZigflowError)):
        raised = (
            error("write", Path("a"), OSError(errno.ENOSPC, "full"))
            if error is StorageError
            else error("it broke")
        )
        again = pickle.loads(pickle.dumps(raised))
        assert type(again) is error
        assert str(again) == str(raised)
        assert raised.args == again.args


class OfAPlugin(ZigflowError, ValueError):
    """An error that a package of one's own raises."""


def test_the_class_decides_whose_error_it_is_wherever_it_is_defined():
    assert not plugins.is_foreign(OfAPlugin("the phase of the moon is wrong"))
    assert plugins.explain(OfAPlugin("one\n  line"), "default") == "one line"
    assert plugins.is_foreign(ValueError("any"))
    assert plugins.explain(ValueError("any"), "default") is None


@pytest.mark.parametrize(
    "package, extra, message",
    [
        ("no-such", "extra", r"^x=y needs no-such: pip install 'zigflow\[extra\]'$"),
        ("no-such", None, r"^x=y needs no-such: pip install no-such$"),
        (
            "numpy",
            None,
            r"numpy, which is installed and cannot be imported \(No module named 'lacking'\): pip",
        ),
    ],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(package, extra, message):
    with pytest.raises(MissingPackageError, match=message), needs(package, "x=y", extra):
        importlib.import_module("lacking")


def test_other_errors_pass_through_an_import():
    with pytest.raises(SettingsError, match="any other"), needs("no-such", "x=y"):
        raise SettingsError("any other")
