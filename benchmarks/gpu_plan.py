"""What gpu.py measures, in which order, at full size or, for a dry run, at a tiny one.

Imports nothing that takes long, so that a list or a table is there at once.
"""

from dataclasses import dataclass, field
from typing import Any

from shapes import SHAPES

TOKENWISE = "tokenwise"
SCAN, CONV = "selective_scan", "causal_conv1d"
OF_MODELS = (SCAN, CONV, TOKENWISE)
DTYPES = ("bfloat16", "float32", "float16")
# Seconds of a stage: what a session of fifteen minutes on a rented GPU holds twice, with room for its start.
STAGE_SECONDS = 480


@dataclass(frozen=True, eq=False)
class Measurement:
    """One line of a result.

    Attributes:
        name: unique in its stage.
        function: a name in ``gpu_functions.FUNCTIONS``.
        arguments: its keywords but for the device, plain JSON values.
        seconds: after which it is stopped.
        needs: (operation, dtype) whose kernels must be right. A measurement of one operation leaves a wrong one out and
            times its peers; one of a whole model is not made.
        twice: run it again in a new process and compare what both say.
        must_agree: a difference between the two is wrong, not just told.
    """

    stage: str
    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 120
    needs: tuple[tuple[str, str], ...] = ()
    twice: bool = False
    must_agree: bool = False


STAGES = {
    "kernels": "every Triton kernel against float64 at the shapes of the tables; a wrong one is not timed afterwards",
    "peers": "scan, convolution and what runs around them beside torch, mamba-ssm, causal-conv1d and attention",
    "steps": "steps of ZigMa-B/1 and of a DiT-B of its parameters and tokens, eager and compiled, with a profile",
    "published": "images per second of the published sizes at 256 and 512 px",
    "sizes": "equal parameters from 256 to 2048 px: ZigMa with and without its order, and a DiT",
    "families": "the same sizes: the published arrangement, DiS, DiM and U-ViT",
    "determinism": "two runs compared bit by bit",
}


def plan(tiny: bool) -> list[Measurement]:
    """All measurements in the order of ``STAGES``; ``tiny`` for a dry run on a CPU."""
    shapes = [(2, 12, 16, 4), (1, 5, 8, 2)] if tiny else SHAPES
    compiler = "eager" if tiny else "inductor"
    made = [
        *_kernels(shapes, tiny), *_peers(shapes, tiny, compiler), *_steps(tiny, compiler), *_published(tiny, compiler),
        *_sizes(tiny, compiler), *_determinism(shapes[0], tiny, compiler),
    ]  # fmt: skip
    return sorted(made, key=lambda measurement: list(STAGES).index(measurement.stage))


def _kernels(shapes, tiny):
    """Usual dtypes and shapes first: what is cut from a stage is then the least used."""
    tokens = list(dict.fromkeys((B, L, max(1, E // 2)) for B, L, E, _ in shapes))
    # One for each block of states, with a rest and without; widths of one warp up to the widest.
    states = [(1, 7, 8, N) for N in (1, 3)] if tiny else [(4, 512, 768, N) for N in (1, 4, 17, 64, 256)]
    widths = [(1, 4, 33)] if tiny else [(4, 300, D) for D in (64, 100, 2048, 4096)]
    for dtype in DTYPES:
        for shape in [*shapes, *states]:
            for reverse in (False, True):
                way = "reversed" if reverse else "forward"
                yield Measurement(
                    "kernels", f"{SCAN} {dtype} {shape} {way}", "check_scan",
                    {"shape": shape, "dtype": dtype, "reverse": reverse}, 150,
                )  # fmt: skip
        for shape in dict.fromkeys(shape[:3] for shape in shapes):
            for reverse in (False, True):
                way = "reversed" if reverse else "forward"
                yield Measurement(
                    "kernels", f"{CONV} {dtype} {shape} {way}", "check_conv",
                    {"shape": shape, "dtype": dtype, "reverse": reverse}, 60,
                )  # fmt: skip
        for stream in dict.fromkeys(("float32", dtype)):
            for shape in [*tokens, *widths]:
                for centered in (False, True):
                    norm = "LayerNorm" if centered else "RMSNorm"
                    yield Measurement(
                        "kernels", f"{TOKENWISE} {dtype} on {stream} {shape} {norm}", "check_tokens",
                        {"shape": shape, "dtype": dtype, "stream": stream, "centered": centered}, 60,
                    )  # fmt: skip


def _peers(shapes, tiny, compiler):
    turns, dtype = (2, "float32") if tiny else (30, "bfloat16")
    for shape in shapes:
        given = {"shape": shape, "dtype": dtype, "turns": turns}
        yield Measurement("peers", f"{SCAN} {dtype} {shape}", "time_scan", given, 120, ((SCAN, dtype),))
        yield Measurement("peers", f"{CONV} {dtype} {shape}", "time_conv", given, 60, ((CONV, dtype),))
        yield Measurement("peers", f"attention {dtype} {shape}", "time_attention", given, 60)
        given = {**given, "shape": (*shape[:2], max(1, shape[2] // 2)), "compiler": compiler}
        yield Measurement(
            "peers", f"{TOKENWISE} {dtype} {given['shape']}", "time_tokens", given, 90, ((TOKENWISE, dtype),)
        )


def _model(stage, name, function, arguments, precision, seconds=240, twice=False):
    dtype = "bfloat16" if precision == "bf16" else "float32"
    needs = tuple((op, dtype) for op in OF_MODELS)
    return Measurement(stage, name, function, {**arguments, "precision": precision}, seconds, needs, twice)


def _steps(tiny, compiler):
    setting = "width 32, depth 2, 16 tokens" if tiny else "ZigMa-B/1 256 px"
    given = {"setting": setting, "repeats": 2 if tiny else 9, "profile": True, "compiler": compiler}
    for mode in ("eager", "compiled"):
        for arrangement, name in (("ours", "ZigMa-B/1"), ("dit", "DiT-B/1")):
            yield _model(
                "steps", f"{name} {mode}", "step", {**given, "arrangement": arrangement, "mode": mode},
                "no" if tiny else "bf16",
            )  # fmt: skip


# Variant, pixels: those of a published table of images per second, and ZigMa.
PUBLISHED = [
    ("dit_xl_2", 256), ("dis_h_2", 256), ("dim_h", 256), ("uvit_huge_imagenet256", 256), ("zigma_b_1", 256),
    ("dit_xl_2", 512), ("dis_h_2", 512), ("dim_h_512", 512), ("uvit_huge_imagenet512", 512), ("zigma_b_2", 512),
]  # fmt: skip


def _published(tiny, compiler):
    tiny_changes = {"depth": 3, "embed_dim": 32, "img_dim": 8}
    # As published: a batch of 64 in float32; then as one would use it; training at the end.
    ways = [
        ("inference", "eager", "no", 64), ("inference", "eager", "bf16", 64), ("train", "eager", "bf16", 32),
        ("inference", "compiled", "bf16", 64), ("train", "compiled", "bf16", 32),
    ]  # fmt: skip
    for kind, mode, precision, batch in ways:
        for variant, pixels in PUBLISHED:
            heads = {"num_heads": 2} if variant.startswith(("dit", "uvit")) else {}
            yield _model(
                "published", f"{variant} {pixels} px, {kind}, {mode}, {precision}", "images_per_second",
                {
                    "variant": variant, "pixels": pixels, "batch": 2 if tiny else batch, "kind": kind, "mode": mode,
                    "repeats": 2 if tiny else 5, "changes": {**tiny_changes, **heads} if tiny else {},
                    "compiler": compiler,
                },
                precision,
            )  # fmt: skip


def _sizes(tiny, compiler):
    settings = ["width 32, depth 2, 16 tokens"]
    if not tiny:
        settings = [f"ZigMa-B/2 {pixels} px" for pixels in (256, 512, 1024, 2048)]
    for stage, names in (
        ("sizes", ("ours", "dit", "none")),
        ("families", ("published", "dis", "dim", "uvit")),
    ):
        for mode in ("eager", "compiled"):
            for setting in settings:
                for arrangement in names:
                    yield _model(
                        stage, f"{setting}, {arrangement}, {mode}", "step",
                        {
                            "setting": setting, "arrangement": arrangement, "mode": mode, "repeats": 2 if tiny else 7,
                            "profile": False, "compiler": compiler,
                        },
                        "no" if tiny else "bf16",
                    )  # fmt: skip


def _determinism(shape, tiny, compiler):
    for dtype in DTYPES[: 1 if tiny else 3]:
        yield Measurement(
            "determinism", f"kernels {dtype} {shape}", "bits_of_kernels", {"shape": shape, "dtype": dtype}, 90,
            tuple((op, dtype) for op in OF_MODELS), True, True,
        )  # fmt: skip
    setting = "width 32, depth 2, 16 tokens" if tiny else "ZigMa-B/1 256 px"
    for mode in ("eager", "compiled"):
        for arrangement, name in (("ours", "ZigMa-B/1"), ("dit", "DiT-B/1")):
            yield _model(
                "determinism", f"{name} {mode}", "bits_of_steps",
                {"setting": setting, "arrangement": arrangement, "mode": mode, "compiler": compiler},
                "no" if tiny else "bf16", 240, True,
            )  # fmt: skip
