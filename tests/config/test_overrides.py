"""A key is set in one way, whatever the chosen YAML lists; what is no key, and null, is one line."""

import re

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.overrides import check_nodes, compose_leniently
from zigflow.settings import Settings, SettingsError
from zigflow.stored_config import complete_from_checkpoint
from zigflow.typed import unknown_key
from zigflow.typed_arguments import as_meant


def plain(overrides, name="default"):
    return OmegaConf.to_container(plugins.compose_config(["run_dir=unused", *overrides], name), resolve=True)


@pytest.mark.parametrize(
    "override",
    [
        "model.num_classes=7",  # in some YAML files and not in others
        "+model.num_classes=7",
        "++model.norm_epsilon=0.001",
        "model.norm_epsilon=0.001",
        "model.ssm_cfg.d_conv=3",
        "process.time_law=uniform",
        "metrics.k=3",
        "data.random_flip=true",
        "+data.source.split=heldout",
        "+optim.lr=1",
    ],
)
def test_a_key_of_the_reader_needs_no_sign_and_bears_any(override):
    key, _, value = override.lstrip("+").partition("=")
    found = OmegaConf.create(plain([override]))
    assert str(OmegaConf.select(found, key)).lower() == value


@pytest.mark.parametrize("model", ["zigzag8_b1", "dit_s_2", "uvit_small"])
def test_the_number_of_classes_is_set_alike_for_every_model(model):
    assert plain([f"model={model}", "data=none", "model.num_classes=5"])["model"]["num_classes"] == 5


def test_the_command_line_that_hydra_gets_is_complete(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    typed = ["model.norm_epsilon=0.01", "+optim.lr=1e-3", "data.batch_size=8", "run_dir=x"]
    want = ["++model.norm_epsilon=0.01", "++optim.lr=1e-3", "data.batch_size=8", "run_dir=x"]
    assert plugins.check_command_line(typed, "default").arguments == want
    sweep = plugins.check_command_line(["-m", "model.norm_epsilon=0.01,0.02"], "default")
    assert sweep.arguments == ["-m", "++model.norm_epsilon=0.01,0.02"] and sweep.sweep and sweep.job is None
    shown = plugins.check_command_line(["--cfg", "job", "model.norm_epsilon=0.01"], "default")
    assert shown.arguments == ["--cfg", "job", "++model.norm_epsilon=0.01"] and shown.job is None


@pytest.mark.parametrize("name", ["default", "sample"])
@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_preset_needs_no_sign_and_bears_any(name, sign):
    typed = [f"{sign}experiment=zigma_celebamm256_zigzag8", f"{sign}debug=cpu_tiny", "ckpt_every=7"]
    assert plain(typed, name) == plain(
        ["+experiment=zigma_celebamm256_zigzag8", "+debug=cpu_tiny", "ckpt_every=7"], name
    )


def test_presets_of_a_sweep_and_a_group_of_the_defaults_list_with_a_sign(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sweep = plugins.check_command_line(["-m", "debug=cpu_tiny,overfit", "optim.lr=1e-3,1e-4"], "default")
    assert sweep.arguments == ["-m", "+debug=cpu_tiny,overfit", "optim.lr=1e-3,1e-4"]
    assert sweep.typed.overrides[-1].endswith("exclude_keys=[]")
    assert plain(["+scan=hilbert"]) == plain(["++scan=hilbert"]) == plain(["scan=hilbert"])


@pytest.mark.parametrize(
    "typed, texts",
    [
        ("note=1e5,1e6", ["1e5", "1e6"]),
        ("note=a,1_000, 007", ["a", "1_000", "007"]),
        ("note=a b,2024_05_01", None),
    ],
)
def test_a_swept_text_stays_as_it_was_typed(typed, texts):
    texts = texts or typed.partition("=")[2].split(",")
    plugins.prepare()
    jobs = plugins._jobs(as_meant([typed]))
    assert [plain(job)["note"] for job, _ in jobs] == texts
    assert [plain([f"note={text}"])["note"] for text in texts] == texts
    assert as_meant(["optim.lr=1e-3,1e-4"]) == ["optim.lr=1e-3,1e-4"]


@pytest.mark.parametrize(
    "given", [["debug=overfit", "debug=cpu_tiny"], ["+debug=overfit", "+debug=cpu_tiny"]]
)
def test_a_preset_given_twice_is_one_line(given):
    with pytest.raises(HydraException) as refused:
        plain(given)
    group = given[0].lstrip("+").partition("=")[0]
    assert plugins.explain(refused.value, "default") == f"{group}= is given more than once: give it once"


@pytest.mark.parametrize(
    "override, hints",
    [
        ("seed=3", ["global_seed"]),
        ("lr=1", ["optim.lr"]),
        ("steps=5", ["data.train_steps", "ode.num_steps"]),
        ("num_steps=5", ["ode.num_steps", "sde.num_steps"]),
        ("batch_size=8", ["data.batch_size"]),
        ("+batch_size=8", ["data.batch_size"]),
        ("batchsize=8", ["data.batch_size"]),
        ("workers=3", ["data.num_workers"]),
        ("optim.steps=1", ["optim.warmup_steps"]),
        ("expermient=digits_demo", ["experiment"]),
    ],
)
def test_near_matches_are_sought_in_every_group(override, hints):
    with pytest.raises((HydraException, SettingsError)) as refused:
        Settings.from_mapping(plain([override]))
    line = plugins.explain(refused.value, "default")
    assert line.startswith(f"unknown key {override.lstrip('+').partition('=')[0]}: did you mean ")
    offered = re.findall(r"[\w.]+", line.partition("did you mean ")[2])
    assert set(hints) <= set(offered) and len(offered) <= 9


@pytest.mark.parametrize("node", ["model", "process", "codec", "data.source", "data.heldout"])
def test_a_keyword_that_a_file_lists_and_the_class_does_not_have_is_refused(node):
    values = plain([])
    place = values["data"][node.partition(".")[2]] if "." in node else values[node]
    check_nodes(values)
    place["numclasses"] = 5
    with pytest.raises(
        SettingsError, match=rf"unknown key {re.escape(node)}\.numclasses: \w+ has no argument"
    ):
        check_nodes(values)


def test_a_name_spelled_alike_hides_no_key_of_the_same_word():
    known = ["seeds", "global_seed", "optim.eps", "optim.warmup_steps", "ode.num_steps"]
    assert unknown_key("seed", known) == "unknown key seed: did you mean seeds or global_seed?"
    assert unknown_key("optim.steps", known).endswith("did you mean optim.eps or optim.warmup_steps?")


@pytest.mark.parametrize(
    "override, parts",
    [
        (
            "+model.numclasses=5",
            ["model.numclasses", "ZigMa has no argument numclasses", "model.num_classes"],
        ),
        ("++data.source.rot=x", ["DigitsSource has no argument rot", "data.source.root"]),
        ("+process.qqqqqq=1", ["Flow has no argument qqqqqq, only path_type, "]),
    ],
)
def test_a_keyword_that_the_class_does_not_have_is_refused_though_it_was_added(override, parts):
    with pytest.raises(SettingsError) as refused:
        plain([override])
    assert all(part in str(refused.value) for part in parts)
    assert plain(["+model.ssm_cfg.d_conv=3"])["model"]["ssm_cfg"]["d_conv"] == 3


@pytest.mark.parametrize(
    "override, hint",
    [
        ("model.num_clases=7", "did you mean model.num_classes?"),
        ("process.time_lw=uniform", "did you mean process.time_law?"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("data.source.splitt=heldout", "did you mean data.source.split?"),
    ],
)
def test_what_nothing_reads_is_refused_with_near_matches(override, hint):
    with pytest.raises(HydraException) as refused:
        plain([override])
    assert hint in plugins.explain(refused.value, "default")


def test_a_metric_of_ones_own_needs_no_sign_when_sampling():
    typed = ["metrics.k=3", "metrics._target_=zigflow.metrics.digit_judge.DigitJudge"]
    given = plain(["ckpt=x", *typed], "sample")
    assert given["metrics"] == {
        "name": "from_checkpoint", "_target_": "zigflow.metrics.digit_judge.DigitJudge", "k": 3,
    }  # fmt: skip
    stored = plain([]) | {"metrics": {"_target_": "another.Metric", "size": 2}}
    own = {"_target_": "zigflow.metrics.digit_judge.DigitJudge", "k": 3}
    assert complete_from_checkpoint(given, stored, "x")["metrics"] == own
    # A keyword alone is for the checkpoint's own metric.
    given = plain(["ckpt=x", "metrics.k=3"], "sample")
    assert complete_from_checkpoint(given, stored, "x")["metrics"] == stored["metrics"] | {"k": 3}
    with pytest.raises(SettingsError, match=r"metrics\.k is a keyword .* give metrics=NAME"):
        complete_from_checkpoint(given, stored | {"metrics": None}, "x")
    with pytest.raises(HydraException):
        plain(["ckpt=x", "metrics.kk=3", "metrics._target_=zigflow.metrics.digit_judge.DigitJudge"], "sample")


def test_an_unknown_key_of_the_checkpoint_s_model_is_told_when_sampling():
    given = plain(["ckpt=x", "model.embed_dmi=3"], "sample")
    with pytest.raises(SettingsError, match=r"unknown key model\.embed_dmi: did you mean model\.embed_dim\?"):
        complete_from_checkpoint(given, plain([]), "x")


def test_nothing_is_composed_twice_without_need():
    asked = []
    made, overrides = compose_leniently(lambda given: asked.append(given) or "made", ["optim.lr=1"])
    assert (made, overrides, asked) == ("made", ["optim.lr=1"], [["optim.lr=1"]])


GROUPS = (
    "wandb",
    "ode",
    "model",
    "data",
    "loop",
    "codec",
    "metrics",
    "process",
    "scan",
    "optim",
    "train",
    "hydra/job_logging",
    "hydra/launcher",
    "hydra/sweeper",
)


@pytest.mark.parametrize(
    "override", [*(f"{group}=null" for group in GROUPS), "model=3", "ode=", "+experiment=null"]
)
@pytest.mark.parametrize("name", ["default", "sample"])
def test_null_for_a_group_is_one_line_with_the_choices(override, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as refused:
        plugins.check_command_line([override, "run_dir=x"], name)
    group = override.lstrip("+").partition("=")[0]
    assert str(refused.value).startswith(f"{override.lstrip('+')} does not exist: ")
    assert "known: " in str(refused.value)
    assert plugins.group_choices(group)[0] in str(refused.value)


@pytest.mark.parametrize(
    "override, part",
    [
        ("model._target_=null", "model names no class: choose model=NAME"),
        ("process._target_=null", "process names no class"),
        ("codec._target_=null", "codec names no class"),
        ("data.source._target_=null", "data.source of data=digits names no class"),
        ("data.source=3", "data.source=3 must be a group of keys"),
        ("data.batch_size=null", "data.batch_size=None must be an integer"),
        ("loop.ema_half_life=null", "loop.ema_half_life=None must be a list"),
    ],
)
def test_null_for_a_key_that_needs_a_value_is_one_line(override, part):
    with pytest.raises(SettingsError) as refused:
        Settings.from_mapping(plain([override]))
    assert part in str(refused.value)
