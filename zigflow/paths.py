"""Where the project's own files lie, in a checkout and in an installed wheel."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """The folder of YAML files: ``zigflow/config`` in a wheel, ``config/`` at the top of a checkout.

    Raises:
        FileNotFoundError: neither exists, the installation is incomplete.
    """
    for candidate in (_HERE / "config", _HERE.parent / "config"):
        if (candidate / "default.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no config folder beside {_HERE}; reinstall zigflow")
