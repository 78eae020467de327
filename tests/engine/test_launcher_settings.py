"""What ``accelerate launch`` is told: each setting is followed or refused by name, none is dropped."""

import os

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from hypothesis import given
from hypothesis import strategies as st

from zigflow import plugins
from zigflow.engine import launch, launcher_settings
from zigflow.engine.launcher_settings import LauncherSettingError, check_settings, launched
from zigflow.preflight import check_training

PLAIN = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]


def environment(options, several=False):
    """What accelerate itself hands to a process that it starts with these options, and its command line."""
    words = [*PLAIN, "--dynamo_backend", "no", *options, "train_acc.py", "grad_accum=1"]
    args = launch_command_parser().parse_args(words)
    args.num_cpu_threads_per_process, args.use_cpu = 1, False
    environ = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    return {k: v for k, v in environ.items() if os.environ.get(k) != v}, words


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--mixed_precision", "bf16"],
        ["--cpu"],
        ["--debug"],
        ["--enable_cpu_affinity"],
        ["--dynamo_use_fullgraph", "--dynamo_use_regional_compilation"],
    ],
)
def test_what_we_do_anyway_is_accepted(options, several):
    environ, words = environment(options, several)
    check_settings(environ, words)
    assert [launched(key, environ, words) for key in ("compile", "grad_accum", "max_grad_norm")] == [None] * 3


@pytest.mark.parametrize(
    "options, part",
    [
        (["--use_fsdp"], "ACCELERATE_USE_FSDP"),
        (["--use_megatron_lm"], "ACCELERATE_USE_MEGATRON_LM"),
        (["--use_parallelism_config", "--parallelism_config_tp_size", "2"], "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)  # fmt: skip
def test_wrappers_are_refused_with_our_key(options, part):
    environ, words = environment(options, several=True)
    with pytest.raises(LauncherSettingError, match=rf"{part}=.*loop\.shard=true"):
        check_settings(environ, words)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "options, parts",
    [
        (["--dynamo_backend", "eager"], ["ACCELERATE_DYNAMO_BACKEND=EAGER", "loop.compile=true"]),
        (["--dynamo_mode", "max-autotune"], ["ACCELERATE_DYNAMO_MODE=max-autotune", "loop.compile=true"]),
        (["--dynamo_use_dynamic"], ["ACCELERATE_DYNAMO_USE_DYNAMIC=True", "drop --dynamo_use_dynamic"]),
        (["--gradient_accumulation_steps", "0"], ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=0", "grad_accum="]),
        (["--gradient_clipping=-1"], ["ACCELERATE_GRADIENT_CLIPPING=-1", "max_grad_norm="]),
    ],
)
def test_other_ways_of_training_are_refused(options, parts, several):
    environ, words = environment(options, several)
    with pytest.raises(LauncherSettingError) as refused:
        check_settings(environ, words)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)
    assert plugins.is_mistake(refused.value)


@given(
    st.from_regex(r"ACCELERATE_USE_[A-Z0-9_]{1,12}", fullmatch=True), st.sampled_from(["true", "1", "True"])
)
def test_a_plug_in_that_is_not_known_is_refused_too(name, value):
    if name == "ACCELERATE_USE_CPU":
        return
    with pytest.raises(LauncherSettingError, match=name):
        check_settings({name: value})
    check_settings({name: "false"})


@given(st.integers(1, 64), st.floats(1e-3, 1e3), st.booleans())
def test_what_has_a_key_of_ours_is_followed(steps, norm, dashes):
    words = [
        "--gradient_accumulation_steps",
        str(steps),
        f"--gradient_clipping={norm}",
        "train_acc.py",
        "x=1",
    ]
    words = [w.replace("_", "-") if dashes and w.startswith("--") else w for w in words]
    assert launched("grad_accum", {}, words) == steps
    assert launched("max_grad_norm", {}, words) == norm
    environ = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(steps), "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    assert launched("grad_accum", environ, ()) == steps
    assert launched("compile", environ, ()) is True
    # As argparse reads them: what begins one option alone.
    short = ["--gradient_accum", str(steps), f"--gradient_c={norm}", "train_acc.py"]
    assert (launched("grad_accum", {}, short), launched("max_grad_norm", {}, short)) == (steps, norm)
    assert launched("grad_accum", {}, ["--gradient", str(steps)]) is None
    # Words after the script are the script's.
    assert launched("grad_accum", {}, ["train_acc.py", "--gradient_accumulation_steps", "3"]) is None


FOLLOWED = [
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "loop.compile", True, "false"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "grad_accum", 4, "2"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "max_grad_norm", 0.5, "null"),
]


@pytest.mark.parametrize("name, told, key, value, other", FOLLOWED)
def test_the_configuration_takes_it_and_a_contradiction_is_named(name, told, key, value, other, monkeypatch):
    def settings(*overrides):
        return plugins.validated(plugins.compose_config(["run_dir=unused", *overrides]))

    def read(found):
        return found.loop.compile if key == "loop.compile" else getattr(found, key)

    default = read(settings())
    assert default != value
    monkeypatch.setenv(name, told)
    followed = settings()
    assert read(followed) == value
    check_training(followed)
    given_alike = settings(f"{key}={str(value).lower()}")
    check_training(given_alike)
    with pytest.raises(LauncherSettingError, match=rf"{key}={other}.*{name}={told}: drop one"):
        check_training(settings(f"{key}={other}"))


def test_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    for config_name in ("default", "sample"):
        with pytest.raises(LauncherSettingError, match="AOT_EAGER"):
            plugins.check_command_line([], config_name)
    with pytest.raises(LauncherSettingError, match="AOT_EAGER"):
        launch.make_accelerator(cpu=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command, expected",
    [
        (["python", "/x/bin/accelerate", "launch", "--cpu", "train_acc.py"], ("--cpu", "train_acc.py")),
        (["python", "-m", "accelerate.commands.launch", "a.py"], ("a.py",)),
        (["/x/bin/accelerate-launch", "a.py"], ("a.py",)),
        (["bash", "-c", "run"], ()),
    ],
)
def test_the_launcher_is_the_parent_process(command, expected, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command)
    launcher_settings.launcher_arguments.cache_clear()
    try:
        assert launcher_settings.launcher_arguments() == expected
    finally:
        launcher_settings.launcher_arguments.cache_clear()
