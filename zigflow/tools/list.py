"""``list``: the names that can be typed."""

import argparse


def main(argv: list[str]) -> int:
    """Print registered names, all kinds or one."""
    kinds = {
        "scans": _scans,
        "models": _models,
        "samplers": _samplers,
        "optimizers": _optimizers,
        "backends": _backends,
        "config": _config,
    }
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools list", description="Print names that can be typed."
    )
    parser.add_argument("kind", nargs="?", choices=sorted(kinds), help="one kind; default: all")
    chosen = parser.parse_args(argv).kind
    for kind, names in kinds.items():
        if chosen in (None, kind):
            print(f"{kind}:")
            print("\n".join(f"  {line}" for line in names()))
    return 0


def _scans() -> list[str]:
    from scans import list_scans

    return list_scans()


def _models() -> list[str]:
    from zigflow.models import list_models

    return list_models()


def _samplers() -> list[str]:
    from zigflow.samplers import SAMPLERS

    return SAMPLERS.names()


def _optimizers() -> list[str]:
    from zigflow.engine.optim import OPTIMIZERS

    return OPTIMIZERS.names()


def _backends() -> list[str]:
    import dis_causal_conv1d
    import dis_mamba

    found = {
        "selective_scan": dis_mamba.available_backends(),
        "causal_conv1d": dis_causal_conv1d.available_backends(),
    }
    return [
        f"{op}/{name}: {'can run' if reason is None else reason}"
        for op, backends in found.items()
        for name, reason in backends.items()
    ]


def _config() -> list[str]:
    from zigflow.paths import config_dir

    groups = sorted(p for p in config_dir().iterdir() if p.is_dir())
    return [f"{g.name}: {', '.join(sorted(p.stem for p in g.glob('*.yaml')))}" for g in groups]
