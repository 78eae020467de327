"""zigflow: flow and diffusion models of images and video that read an image along pluggable scan orders."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ._version import __version__

__all__ = ["__version__"]


def _bridge_checkout() -> None:
    """In a source checkout, let the top-level folder ``datasets/`` be imported as ``zigflow.datasets``.

    A wheel carries the folder inside the package already. A top-level package called ``datasets`` would
    shadow the Hugging Face library of that name, hence the folder has no ``__init__.py``.
    """
    here = Path(__file__).resolve().parent
    folder = here.parent / "datasets"
    name = "zigflow.datasets"
    if (here / "datasets").is_dir() or not folder.is_dir() or name in sys.modules:
        return
    module = ModuleType(name, "Data sources, one file each.")
    module.__path__ = [str(folder)]
    spec = ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module.__spec__ = spec
    sys.modules[name] = module
    globals()["datasets"] = module


_bridge_checkout()
