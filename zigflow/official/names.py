"""What the published code bases share: how files name things, and where a model is placed."""

from typing import Any

import torch

from .keywords import inert, only

# Official weights are loaded on the CPU in float32; the caller moves and casts the module.
PLACEMENT = {
    "device": inert(),
    "dtype": only(
        None, torch.float32, "float32", because="weights are loaded in float32; cast the module afterwards"
    ),
}


def namespace() -> list[Any]:
    """The command-line arguments that the training scripts of DiT, SiT and DiS store as ``args``."""
    from argparse import Namespace

    return [Namespace]
