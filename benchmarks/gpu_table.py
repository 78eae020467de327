"""The results of gpu.py as Markdown for the README and docs/kernels.md."""

from collections.abc import Iterable

from gpu_plan import STAGES

# Images per second of one forward pass on an A100, batch 64, float32: tables 1 and 2 of the DiCo paper.
PUBLISHED_RATES = {
    ("uvit_huge_imagenet256", 256): 73.5, ("dit_xl_2", 256): 76.9, ("dis_h_2", 256): 34.0, ("dim_h", 256): 25.1,
    ("dit_xl_2", 512): 18.6, ("dis_h_2", 512): 8.6, ("dim_h_512", 512): 7.4,
}  # fmt: skip


def table(data: dict) -> str:
    """All stages that have results, each as a table, with what failed below it."""
    made = {
        "kernels": _kernels, "peers": _peers, "steps": _steps, "published": _published, "sizes": _sizes,
        "families": _sizes, "determinism": _determinism,
    }  # fmt: skip
    parts = [_head(data)]
    for stage, text in STAGES.items():
        found = data["stages"].get(stage)
        if not found:
            continue
        rows = {name: entry for name, entry in found.items() if entry.get("result")}
        parts += [
            f"### {text[0].upper()}{text[1:]}",
            *([made[stage](rows)] if rows else []),
            _failures(found),
        ]
    if len(parts) == 1:
        parts.append("Nothing has been measured.")
    return "\n\n".join(part for part in parts if part)


def _head(data: dict) -> str:
    if data["dry_run"]:
        return "**A dry run on a CPU at tiny sizes: the numbers mean nothing.**"
    if not data["runs"]:
        return "Not measured."
    used = sorted({entry["run"] for stage in data["stages"].values() for entry in stage.values()})
    runs = [data["runs"][index] for index in used] or data["runs"][-1:]
    hardware = ", ".join(dict.fromkeys(run["hardware"] for run in runs))
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in runs))
    versions = ", ".join(dict.fromkeys(f"torch {run['versions']['torch']}" for run in runs))
    return f"{hardware}, {versions}, commit {commits}; `python benchmarks/gpu.py`."


def _failures(found: dict) -> str:
    lines = []
    for name, entry in found.items():
        if entry["status"] != "done":
            why = entry.get("error") or "; ".join(entry["result"]["wrong"])
            lines.append(f"- {name}: {entry['status']}: {why}")
    return "\n".join(lines)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _kernels(found: dict) -> str:
    """Per operation and dtype the largest error of all checks."""
    groups: dict[tuple[str, str], list] = {}
    for entry in found.values():
        result = entry["result"]
        groups.setdefault((result["operator"], result["dtype"]), []).append(result)
    rows = []
    for (op, dtype), results in groups.items():
        errors = [each for result in results for each in result["errors"].items()]
        of_output = [e["of_max"] for name, e in errors if not name.startswith("gradient")]
        of_gradient = [e["of_max"] for name, e in errors if name.startswith("gradient")]
        right = sum(not result["wrong"] for result in results)
        rows.append([op, dtype, f"{right} of {len(results)}", _most(of_output), _most(of_gradient)])
    return _markdown(("operation", "dtype", "checks right", "largest error, output", "gradients"), rows)


def _most(values: list) -> float | None:
    """The largest, None where one is not finite."""
    return None if None in values else max(values, default=None)


def _peers(found: dict) -> str:
    rows = []
    for name, entry in found.items():
        result = entry["result"]
        forward, backward = (result["milliseconds"][kind] for kind in ("forward", "backward"))
        ours = {kind: result["milliseconds"][kind].get("triton") for kind in ("forward", "backward")}
        for way in forward:
            each = {"forward": forward[way], "backward": backward.get(way)}
            over = [each[kind] / ours[kind] if each[kind] and ours[kind] else None for kind in each]
            rows.append([name, way, each["forward"], each["backward"], *over])
    return _markdown(("shape", "way", "forward, ms", "backward, ms", "over triton", "backward"), rows)


def _steps(found: dict) -> str:
    rows = []
    for name, entry in found.items():
        result = entry["result"]
        if "train" in result:
            rows.append([name, *_step(result), result["parameters"]])
    text = _markdown(
        ("model", "training, ms", "images/s", "MFU", "peak MiB", "inference, images/s", "parameters"), rows
    )
    profiles = [
        f"{name}:\n\n"
        + _markdown(
            ("group", "ms", "share"),
            ([r["group"], r["ms"], f"{100 * r['share']:.1f} %"] for r in entry["result"]["profile"]["rows"]),
        )
        for name, entry in found.items()
        if "profile" in entry["result"]
    ]
    return "\n\n".join([text, *profiles])


def _step(result: dict) -> list:
    train, inference = result["train"], result["inference"]
    return [
        train["step_ms"], train["images_per_second"], train["mfu"], train["peak_mib_above_state"],
        inference["images_per_second"],
    ]  # fmt: skip


def _published(found: dict) -> str:
    rows = []
    for entry in found.values():
        given, result = entry["arguments"], entry["result"]
        if "images_per_second" not in result:
            continue
        as_published = (given["kind"], given["mode"], given["precision"]) == ("inference", "eager", "no")
        published = PUBLISHED_RATES.get((given["variant"], given["pixels"])) if as_published else None
        rows.append(
            [
                given["variant"], given["pixels"], given["kind"], given["mode"],
                "float32" if given["precision"] == "no" else given["precision"], given["batch"],
                result["images_per_second"], result["mfu"], published,
            ]
        )  # fmt: skip
    head = ("model", "px", "", "", "precision", "batch", "images/s", "MFU", "published, A100")
    return _markdown(head, rows)


def _sizes(found: dict) -> str:
    """Beside every arrangement its step over that of ours at the same setting and mode."""
    steps = {}
    for entry in found.values():
        given = entry["arguments"]
        if "train" in entry["result"]:
            steps[given["setting"], given["mode"], given["arrangement"]] = entry["result"]
    rows = []
    for (setting, mode, arrangement), result in steps.items():
        ours = steps.get((setting, mode, "ours"))
        over = None if ours is None else result["train"]["step_ms"] / ours["train"]["step_ms"]
        rows.append([setting, arrangement, mode, *_step(result), over])
    head = (
        "setting",
        "model",
        "",
        "training, ms",
        "images/s",
        "MFU",
        "peak MiB",
        "inference, images/s",
        "over ours",
    )
    return _markdown(head, rows)


def _determinism(found: dict) -> str:
    rows = [
        [name, "the same bits" if e["result"]["equal"] else f"differ: {', '.join(e['result']['differ'])}"]
        for name, e in found.items()
    ]
    return _markdown(("run twice", ""), rows)
