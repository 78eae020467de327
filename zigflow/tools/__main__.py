"""``python -m zigflow.tools COMMAND``: small commands around the two big ones."""

import importlib
import sys

from zigflow.paths import expanded
from zigflow.registry import unknown_name

COMMANDS = {
    "list": "names that can be typed: models, scans, samplers, kernel backends, configuration groups",
    "plot-scans": "draw scan orders",
    "show-config": "print a composed and validated configuration",
    "make-shards": "write indexed shards from digits, an image folder, idx files or published features",
    "verify-shards": "check shards byte for byte",
    "convert-checkpoint": "turn an official .pt file into a checkpoint of ours",
    "count-flops": "count a model's parameters and operations per sample, by module",
    "evaluate": "judge a folder of PNG files or an npz archive with the metrics of a configuration",
    "schema": "print the JSON schema of a configuration, for editors",
    "docs-keys": "write docs/keys.md and docs/environment.md from the declarations",
    "demo-report": "print what a sampled run's results.json says and where its pictures lie",
    "doctor": "print versions, devices and which kernel backends can run",
}

# Those that compose a configuration, those that take or print other names, and of these the ones that only show them.
COMPOSING = ("show-config", "convert-checkpoint", "count-flops", "evaluate")
NAMING = ("plot-scans", "list", "doctor", "schema")
SHOWING = ("list", "doctor", "schema")


def main(argv: list[str] | None = None) -> int:
    """Dispatch to ``zigflow.tools.<command>.main``; each command is imported only when it is called."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: python -m zigflow.tools COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"error: {unknown_name('command', name, list(COMMANDS))}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"zigflow.tools.{name.replace('-', '_')}")
    try:
        return module.main([_with_home(argument) for argument in _with_own_files(name, rest)])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _with_own_files(command: str, arguments: list[str]) -> list[str]:
    """Load the files of one's own that are named by plugins= or ZIGFLOW_PLUGINS, and look for YAML in --config-dir.

    What only shows something tells of a file that cannot be loaded and goes on; what types no names loads none.
    """
    from zigflow import plugins
    from zigflow.typed_plugins import with_plugin_files

    if command not in COMPOSING:
        found = (
            with_plugin_files(arguments, strict=command not in SHOWING) if command in NAMING else arguments
        )
        return [argument for argument in found if not argument.startswith("plugins=")]
    rest, given = [], iter(arguments)
    for argument in given:
        option, equals, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            plugins.add_config_dir(value if equals else next(given, ""))
        else:
            rest.append(argument)
    return with_plugin_files(rest)


def _with_home(argument: str) -> str:
    """A path that the shell has passed on as it was typed: --output=~/x, samples=~/x; overrides are composed later."""
    name, equals, value = argument.rpartition("=")
    if value.startswith("~") and (not name or name.startswith("--") or name in ("samples", "output")):
        return f"{name}{equals}{expanded(name.lstrip('-') or 'argument', value)}"
    return argument


if __name__ == "__main__":
    sys.exit(main())
