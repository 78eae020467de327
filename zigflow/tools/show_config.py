"""``show-config``: compose, validate, print, stop."""

import argparse

from omegaconf import OmegaConf

from zigflow import plugins


def main(argv: list[str]) -> int:
    """Print the configuration that a command with these overrides would run with."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools show-config",
        description="Print a composed and validated configuration.",
    )
    parser.add_argument("overrides", nargs="*", help="GROUP=CHOICE and KEY=VALUE, as for train_acc.py")
    parser.add_argument("--command", choices=("train", "sample"), default="train")
    args = parser.parse_args(argv)
    name = {"train": "default", "sample": "sample"}[args.command]
    try:
        cfg = plugins.compose_config([*args.overrides, "run_dir=outputs/shown"], name)
        if args.command == "train":
            plugins.validated(cfg)
    except Exception as error:
        line = plugins.explain(error, name)
        if line is None:
            raise
        raise ValueError(line) from error
    print(OmegaConf.to_yaml(cfg, resolve=True))
    return 0
