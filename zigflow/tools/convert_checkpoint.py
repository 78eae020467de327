"""``convert-checkpoint``: an official .pt file becomes a checkpoint of ours."""

import argparse
from pathlib import Path

from zigflow import plugin_files, plugins
from zigflow.shapes import data_form


def main(argv: list[str]) -> int:
    """Write RUN_DIR/checkpoints/step-N with safetensors weights and a configuration to sample with."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools convert-checkpoint",
        description="Read an official .pt file safely and write a checkpoint that sample_acc.py takes.",
    )
    parser.add_argument("file", type=Path, help="the official file (.pt, .pth); its EMA weights are taken")
    parser.add_argument(
        "overrides", nargs="*", help="model=NAME (where the file does not say), codec=sd_vae, KEY=VALUE"
    )
    parser.add_argument(
        "--family",
        help="the code base it comes from: zigma, dim, dis, dit, sit, uvit, uvit_t2i; default: that of model=",
    )
    parser.add_argument(
        "--null-text", type=Path, help="the encoded empty prompt (S, D) as .npy, for guidance of a text model"
    )
    parser.add_argument("--output", type=Path, required=True, help="run directory to write")
    args = parser.parse_intermixed_args(argv)

    from zigflow.engine import checkpoint as checkpoints
    from zigflow.engine.ranks import Ranks
    from zigflow.engine.run_state import Counters, weight_files
    from zigflow.official import family_of, official_arguments, process_of, read_null_text, target_of
    from zigflow.preflight import scaled_codec
    from zigflow.stored_config import open_stored

    experiment = any(o.lstrip("+").startswith("experiment=") for o in args.overrides)
    named = experiment or any(o.startswith("model=") for o in args.overrides)
    try:
        # An experiment brings its data, and with them the codec.
        none = ["metrics=none"] if experiment else ["data=none", "metrics=none"]
        common = [*none, *args.overrides, f"run_dir={args.output}"]
        config = plugins.plain(plugins.compose_config(common))
        family = args.family or (family_of(config["model"]) if named else "zigma")
        if named and target_of(family) != config["model"].get("_target_"):
            raise ValueError(f"--family {family} is not a family of model={config['model'].get('name')}")
        if not experiment and not any(o.startswith("process=") for o in args.overrides):
            process = f"process={process_of(family)}"
            config = plugins.plain(plugins.compose_config([process, *common]))
        stored = open_stored(args.file, config["model"], family)
        given = {k: v for k, v in config["model"].items() if k not in ("name", "_target_")}
        if not named:
            if stored.ctor_kwargs is None:
                raise ValueError(f"{args.file} does not say how its model was built: give model=NAME")
            given = stored.ctor_kwargs
        null_text = read_null_text(args.null_text) if args.null_text else None
        # A random scan's orders are not in an official file; a seed given here is a statement, not a keyword of theirs.
        seed = {k: given[k] for k in ("scan_seed",) if k in given}
        kwargs = official_arguments(family, {k: v for k, v in given.items() if k not in seed})
        names = {"name": config["model"]["name"] if named else args.file.stem, "_target_": target_of(family)}
        config["model"] = {**names, **kwargs, **seed}
        config["data"] |= data_form(config["model"])
        config["codec"] = scaled_codec(config["codec"])
        files = plugin_files.use(config)
        plugins.checked(config, trains=False)
    except Exception as error:
        line = plugins.explain(error, "default")
        if line is None:
            raise
        raise ValueError(line) from error
    model = stored.official_model({**kwargs, **seed}, null_text)
    step = stored.step or 0
    facts = {"plugin_files": files, "converted_from": {"family": family, "file": args.file.name}}
    shared = weight_files(model, config, Counters(step=step), facts)
    folder = args.output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoints.save(folder, step, shared=shared, own={}, ranks=Ranks())
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0
