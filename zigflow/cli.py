"""The two commands. Composes the configuration, answers a mistake in one line, then hands over."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from zigflow import hydra_folders, hydra_run, paths, plugins
from zigflow.command_help import help_text
from zigflow.errors import OtherRankError
from zigflow.typed_arguments import as_meant
from zigflow.typed_plugins import with_plugin_files


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
        keep: where the error of a single run is put, with its exit code, since Hydra would print a paragraph of its
            own before ours. Those of a sweep are left to Hydra, which goes on with the other jobs and names the
            overrides of those that failed.
    """

    def __init__(self, config_name: str, keep: list[tuple[Exception, int]] | None = None):
        self.config_name = config_name
        self.keep = keep

    def __call__(self, cfg: DictConfig) -> float | None:
        from zigflow.engine import exits
        from zigflow.engine.launch import leave
        from zigflow.engine.signals import stop

        stop.install()  # a sweep may run its jobs in processes of its own
        exits.note.release()
        stop.build()
        trains = self.config_name == "default"
        cfg.run_dir = paths.expanded("run_dir", str(cfg.run_dir))
        try:
            hydra_folders.one_folder(cfg)
            if trains:
                from zigflow.train_job import train_from_config

                folder = train_from_config(cfg)
            else:
                from zigflow.sample_job import sample_from_config

                folder = sample_from_config(cfg)
            value = _objective(cfg, folder) if plugins.is_sweep() else None
            exits.note.write(exits.DONE, "done")
            leave(done=True)
            return value
        except BaseException as error:
            code = _leave_traces(error, Path(cfg.run_dir) if trains else None)
            leave(done=False)
            if not isinstance(error, Exception) or self.keep is None or plugins.is_sweep():
                raise
            self.keep.append((error, code))
            return None

    def __reduce__(self):
        return _revived, (self.config_name,)


def _objective(cfg: DictConfig, folder: Path | None) -> float | None:
    """What a job of a sweep returns to the sweeper; a sweeper that looks for better runs needs a number.

    Raises:
        SettingsError: the number that was asked for is not there.
    """
    from zigflow.objective import objective_of
    from zigflow.settings import SettingsError

    found = None if folder is None else objective_of(Path(folder), cfg.loop.objective)
    if found is None:
        if plugins.is_plain_sweep():
            return None
        raise SettingsError(
            f"the sweeper needs a number and {folder} has none: give metrics=NAME, or loop.objective=NAME"
        )
    return found[1]


def _revived(config_name: str) -> _Job:
    plugins.prepare()
    return _Job(config_name)


def _run(config_name: str) -> int:
    """The exit code: 0 done, 1 failed, 2 a mistake in the configuration, 75 stopped by a signal, 130 by Ctrl-C.

    Mistakes and errors of our own are told in one line; HYDRA_FULL_ERROR=1 shows the traceback. Foreign errors always
    keep theirs. A run that has taken its directory finds the code there too, one file per process.
    """
    from zigflow.engine import exits
    from zigflow.engine.signals import Stopped, stop

    stop.install()
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ended: list[tuple[Exception, int]] = []
    trains = config_name == "default"
    named = None
    try:
        sys.argv[1:] = as_meant(with_plugin_files(sys.argv[1:]))
        named = _run_dir_of(sys.argv[1:]) if trains else None
        plugins.prepare()
        job = _Job(config_name, ended)
        line = plugins.check_command_line(sys.argv[1:], config_name)
        if hydra_run.runs_here(line):
            _refuse_second_writer(named)
            hydra_run.start(line, job, config_name)
        elif line.typed.help:
            sys.stdout.write(f"{help_text(line.typed, config_name)}\n")
        else:
            sys.argv[1:] = line.arguments
            hydra.main(version_base="1.3", config_path=str(paths.config_dir()), config_name=config_name)(
                job
            )()
        if ended:
            raise ended[0][0]
    except Stopped as left:
        if not exits.note.claimed:
            _leave_traces(left, named)
        kept = "pictures written so far are kept; the same command goes on"
        sys.stderr.write(f"{left if trains else f'stopped by {stop.received}: {kept}'}\n")
        return stop.code
    except Exception as error:
        if ended and stop.received and ended[0][1] == stop.code:
            sys.stderr.write(f"stopped by {stop.received}: {error}\n")
            return stop.code
        line = None if full else plugins.explain(error, config_name)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return exits.MISTAKE if plugins.is_mistake(error) else exits.FAILED
    finally:
        stop.ignore()
    return exits.DONE


def _leave_traces(error: BaseException, run_dir: Path | None) -> int:
    """Write how the run ended into its directory, or take away a directory that it never used; the exit code."""
    from zigflow.engine import exits
    from zigflow.engine.lock import RunDirError, refuse_second_writer, remove_unused
    from zigflow.engine.signals import Stopped, stop

    rank = int(os.environ.get("RANK", "0"))
    code, reason = exits.FAILED, f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        code, reason = exits.INTERRUPTED, "interrupted (SIGINT); nothing was saved on the way out"
    elif isinstance(error, Stopped):
        code, reason = stop.code, str(error)
    elif plugins.is_mistake(error):
        code = exits.MISTAKE
    elif stop.received and (isinstance(error, OtherRankError) or plugins.is_foreign(error)):
        # A process that left before this one knew takes its connection with it.
        code, reason = stop.code, f"stopped by {stop.received}; {reason}"
    if run_dir is None:
        return code
    if code in (exits.STOPPED, exits.INTERRUPTED) and not exits.note.claimed:
        try:
            refuse_second_writer(run_dir)
            exits.note.claim(run_dir, rank)
        except RunDirError:
            return code
    if code == exits.MISTAKE and rank == 0:
        remove_unused(run_dir)
    exits.note.write(code, reason)
    return code


def _run_dir_of(arguments: list[str]) -> Path | None:
    """The run directory that the command line names."""
    named = hydra_folders.typed_run_dir(arguments)
    return None if named is None else Path(named)


def _refuse_second_writer(run_dir: Path | None) -> None:
    """Before Hydra writes its files over those of a run that is still going."""
    from zigflow.engine.lock import refuse_second_writer

    if run_dir is not None and os.environ.get("RANK", "0") == "0":
        refuse_second_writer(run_dir)
