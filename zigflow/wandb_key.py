"""A key of wandb stands in no configuration: Hydra, logs and checkpoints would repeat it."""

import os
import re

from omegaconf import DictConfig, OmegaConf

from zigflow.settings import WANDB_KEY, SettingsError

__all__ = ["refuse_key", "types_key"]

_SECRET = r"\w*(key|token|secret|password)"


def types_key(argument: str) -> bool:
    """Whether an override of the command line holds a key of wandb, whatever the override is called."""
    name, _, value = argument.lstrip("+~ ").partition("=")
    if not value.strip():
        return False
    group = name.strip().lower()
    inside = group == "wandb" and re.search(rf"{_SECRET}['\"]?\s*:", value, re.IGNORECASE)
    return bool(re.fullmatch(rf"wandb\.{_SECRET}", group) or inside or "WANDB_API_KEY" in argument)


def refuse_key(cfg: DictConfig, hydra: DictConfig) -> None:
    """Refuse a key of wandb that a YAML file holds or takes from the environment: checkpoints repeat what is resolved.

    Raises:
        SettingsError: there is one; its value is not repeated.
    """
    names = [str(name).lower() for name in OmegaConf.select(cfg, "wandb") or ()]
    exported = OmegaConf.select(hydra, "job.env_set") or ()
    key = os.environ.get("WANDB_API_KEY")
    repeated = bool(key) and str(key) in str(OmegaConf.to_container(cfg, resolve=True))
    if repeated or "WANDB_API_KEY" in exported or any(re.fullmatch(_SECRET, name) for name in names):
        raise SettingsError(WANDB_KEY)
