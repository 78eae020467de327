"""The two commands. Composes the configuration, answers a mistake in one line, then hands over."""

import os
import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from zigflow import paths, plugins


def train() -> int:
    """Console script ``zigflow-train`` and ``train_acc.py``."""

    def work(cfg: DictConfig) -> None:
        from zigflow.build import train_from_config

        train_from_config(cfg)

    return _run(work, "default")


def sample() -> int:
    """Console script ``zigflow-sample`` and ``sample_acc.py``."""

    def work(cfg: DictConfig) -> None:
        from zigflow.sample_job import sample_from_config

        sample_from_config(cfg)

    return _run(work, "sample")


def _run(work: Callable[[DictConfig], None], config_name: str) -> int:
    """0 on success, 2 for a mistake in the configuration, 1 for a run that failed.

    Both are told in one line; HYDRA_FULL_ERROR=1 shows the traceback. Foreign errors always keep theirs.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    plugins.prepare()
    raised: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        # Hydra would print a paragraph of its own before ours.
        try:
            work(cfg)
        except Exception as error:
            raised.append(error)

    main = hydra.main(version_base="1.3", config_path=str(paths.config_dir()), config_name=config_name)(job)
    try:
        plugins.check_command_line(sys.argv[1:], config_name)
        main()
        if raised:
            raise raised[0]
    except Exception as error:
        line = None if full else plugins.explain(error, config_name)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return 2 if plugins.is_mistake(error) else 1
    return 0
