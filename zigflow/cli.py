"""The two commands. Composes the configuration, answers a mistake in one line, then hands over."""

import os
import sys

import hydra
from omegaconf import DictConfig

from zigflow import paths, plugins


def train() -> int:
    """Console script ``zigflow-train`` and ``train_acc.py``."""
    return _run("default")


def sample() -> int:
    """Console script ``zigflow-sample`` and ``sample_acc.py``."""
    return _run("sample")


class _Job:
    """What Hydra calls with a composed configuration; a sweep's launcher may send it to another process.

    Args:
        config_name: ``default`` trains, ``sample`` samples.
        keep: where the error of a single run is put, since Hydra would print a paragraph of its own before ours.
            Those of a sweep are left to Hydra, which goes on with the other jobs and names the overrides of those
            that failed.
    """

    def __init__(self, config_name: str, keep: list[Exception] | None = None):
        self.config_name = config_name
        self.keep = keep

    def __call__(self, cfg: DictConfig) -> None:
        try:
            if self.config_name == "default":
                from zigflow.build import train_from_config

                train_from_config(cfg)
            else:
                from zigflow.sample_job import sample_from_config

                sample_from_config(cfg)
        except Exception as error:
            if self.keep is None or plugins.is_sweep():
                raise
            self.keep.append(error)

    def __reduce__(self):
        return _revived, (self.config_name,)


def _revived(config_name: str) -> _Job:
    plugins.prepare()
    return _Job(config_name)


def _run(config_name: str) -> int:
    """0 on success, 2 for a mistake in the configuration, 1 for a run that failed.

    Both are told in one line; HYDRA_FULL_ERROR=1 shows the traceback. Foreign errors always keep theirs.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    plugins.prepare()
    raised: list[Exception] = []
    job = _Job(config_name, raised)
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
