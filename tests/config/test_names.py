"""Names are checked once against the registries; what a package of one's own registers can be typed and used."""

import copy
import json
import re
import sys
from functools import cache

import pytest
import yaml

from tests.helpers.own_package import own_package  # noqa: F401
from zigflow import names, plugins
from zigflow.evaluation_job import watch
from zigflow.preflight import check_training
from zigflow.registry import Registry
from zigflow.sample_job import sample_from_config
from zigflow.settings import SettingsError
from zigflow.train_job import train_from_config

TINY = [
    "data=synthetic", "data.image_size=4", "data.train_steps=2", "data.batch_size=4", "model.embed_dim=8",
    "model.depth=2", "model.patch_size=1", "ckpt_every=2", "log_every=1", "loop.progress=false", "metrics=none",
]  # fmt: skip
SAMPLE = [
    "num_fid_samples=2",
    "offline_sample_local_bs=2",
    "loop.progress=false",
    "ode.num_steps=3",
    "sde.num_steps=3",
]
GAUSSIAN = ["process=gaussian", "sample_mode=diffusion"]


@cache
def composed(*overrides):
    return plugins.plain(plugins.compose_config([*TINY, "run_dir=unused", *overrides]))


def check(*overrides):
    """As a command checks; choices of groups are composed, keys are put where composing would put them."""
    choices = [o for o in overrides if re.match(r"(process|model|codec|metrics)=", o)]
    plain = copy.deepcopy(composed(*choices))
    for key, value in (o.split("=", 1) for o in overrides if o not in choices):
        *path, last = key.split(".")
        node = plain
        for part in path:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value)
        if path == ["train"]:
            plain["process"][last] = node[last]
    settings = plugins.checked(plain)
    check_training(settings)
    return settings


@pytest.mark.parametrize("key", names.named_keys())
def test_an_unknown_name_is_refused_with_its_key_and_what_is_near(key):
    known = names.named_keys()[key]
    meant = max((n for n in known if n is not None and not n.startswith("torchdiffeq/")), key=len)
    typed = f"{meant[:-1]}zz"
    value = f"[{typed}]" if key == "loop.trackers" else typed
    with pytest.raises(SettingsError) as refused:
        check(f"{key}={value}", *(["upsample.factor=2"] if key.startswith("upsample.") else []))
    text = str(refused.value)
    assert text.startswith(f"{key}={typed!r}: ") and f"'{meant}'" in text and "\n" not in text
    if isinstance(known, Registry):
        assert known.kind in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["ode.sampling_method=ralston"],
        ["sde.sampling_method=quiet", "sample_mode=SDE"],
        ["sde.diffusion_form=flat_form", "sample_mode=SDE"],
        ["diffusion.sampling_method=one_jump", "diffusion.num_steps=1", *GAUSSIAN],
        ["train.path_type=Square"],
        ["train.prediction=half_v"],
        ["process.prediction=half_v", "process=gaussian"],
        ["process.betas=even", "process=gaussian"],
        ["process.time_law=late"],
        ["optim.name=own_sgd"],
        ["loop.trackers=[lines]"],
        ["model.mixer=last_token"],
        ["model.ssm_cfg.backend=counted"],
        ["codec=halves"],
        ["metrics=brightness"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_a_package_registers_can_be_typed(overrides, own_package):  # noqa: F811
    key, _, name = overrides[0].partition("=")
    with pytest.raises(SettingsError) as refused:
        check(*overrides)
    assert key in str(refused.value) and name.strip("[]") in str(refused.value)
    own_package()
    settings = check(*overrides)
    if key in ("codec", "metrics"):
        assert getattr(settings, key)["_target_"].startswith("own_kinds.")


def test_a_run_uses_what_a_package_registers(own_package, tmp_path):  # noqa: F811
    own_package()
    run = train_from_config(
        plugins.compose_config(
            [*TINY, "train.path_type=Square", "train.prediction=half_v", "process.time_law=late", "codec=halves",
             "loop.trackers=[lines]", "model.mixer=last_token", "optim.name=own_sgd", f"run_dir={tmp_path / 'run'}"]
        ),
        watch,
    )  # fmt: skip
    lines = (run / "lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"] and "train/loss" in lines[0]
    stored = json.loads((run / "checkpoints" / "step-0000002" / "trainer.json").read_text())
    assert stored["plugins"] == ["own_kinds"] and stored["counters"]["tracking"]["lines"]["kept"] == 1
    ode, sde = (
        ["ode.sampling_method=ralston"],
        ["sample_mode=SDE", "sde.sampling_method=quiet", "sde.diffusion_form=flat_form"],
    )
    for mode in (ode, sde):
        wanted = [
            f"ckpt={run}",
            "metrics=brightness",
            *SAMPLE,
            f"sample_dir={tmp_path / str(len(mode))}",
            *mode,
            "run_dir=x",
        ]
        folder = sample_from_config(plugins.compose_config(wanted, "sample"))
        assert len(list(folder.glob("[0-9]*.png"))) == 2
        assert 0 <= json.loads((folder / "results.json").read_text())["metrics"]["brightness"] <= 255


def test_a_diffusion_uses_what_a_package_registers(own_package, tmp_path):  # noqa: F811
    own_package()
    run = train_from_config(
        plugins.compose_config(
            [
                *TINY,
                "process=gaussian",
                "process.betas=even",
                "model.ssm_cfg.backend=counted",
                f"run_dir={tmp_path / 'run'}",
            ]
        )
    )
    assert sys.modules["own_kinds"].CountedScan.calls >= 4
    folder = sample_from_config(
        plugins.compose_config(
            [f"ckpt={run}", "sample_mode=diffusion", "diffusion.sampling_method=one_jump", "diffusion.num_steps=1",
             "metrics=none", *SAMPLE, f"sample_dir={tmp_path / 'samples'}", "run_dir=x"], "sample",
        )
    )  # fmt: skip
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert protocol["function_evaluations"] == 1 and protocol["time"]["last_step"] == "data"
    with pytest.raises(SettingsError, match="diffusion.num_steps=2: there is one jump"):
        check("diffusion.sampling_method=one_jump", "diffusion.num_steps=2")


def test_a_subclass_is_what_its_class_is(own_package):  # noqa: F811
    own_package()
    plugins.load_plugins()
    target = "process._target_=own_kinds.OwnFlow"
    with pytest.raises(SettingsError, match="OwnFlow has no chain of steps"):
        check(target, "sample_mode=diffusion")
    with pytest.raises(SettingsError, match="OwnFlow does not read"):
        check(target, "model=dit_s_2", "model.in_channels=3", "model.img_dim=4")
    with pytest.raises(SettingsError, match="use_latent=true"):
        check("codec._target_=own_kinds.OwnIdentity", "use_latent=true")
    assert check(target).process["_target_"] == "own_kinds.OwnFlow"


def test_a_process_of_ones_own_is_asked_what_it_can_do(monkeypatch):
    from zigflow.processes import Flow

    class Plain(Flow):
        def convert(self, value, x, t, target, source=None):
            return super().convert(value, x, t, target, source)

    class Both(Plain):
        reads_variance = True
        feeds_noise_level = True

    for name, cls in (("Plain", Plain), ("Both", Both)):
        monkeypatch.setattr(sys.modules["zigflow.processes.flow"], name, cls, raising=False)
    variance = ["model=dit_s_2", "model.in_channels=3", "model.img_dim=4"]
    with pytest.raises(SettingsError, match="Plain does not read"):
        check("process._target_=zigflow.processes.flow.Plain", *variance)
    check("process._target_=zigflow.processes.flow.Both", *variance)


def test_a_family_of_names_is_imported_when_one_is_asked_for():
    asked = []

    def members():
        asked.append(1)
        return {"far/one": 1, "far/two": 2}

    registry: Registry[int] = Registry("thing")
    registry.register("near", 0)
    registry.register_family("far/", members)
    assert registry.get("near") == 0 and "near" in registry and "other" not in registry and not asked
    assert registry.get("far/one") == 1 and "far/three" not in registry
    assert registry.names() == ["far/one", "far/two", "near"] == list(registry) and len(registry) == 3
    with pytest.raises(ValueError, match="already registered"):
        registry.register_family("far/", dict)

    def missing():
        raise ImportError("needs the package far")

    registry.register_family("gone/", missing)
    assert registry.names() == ["far/one", "far/two", "near"]
    with pytest.raises(ImportError, match="needs the package far"):
        registry.get("gone/one")


def test_an_object_cannot_take_the_name_of_another_module(monkeypatch):
    from zigflow.samplers import ODE_SOLVERS
    from zigflow.samplers.ode_fixed import FixedStep

    with pytest.raises(
        ValueError, match=r"ODE method 'euler' is already registered by zigflow\.samplers\.ode_fixed"
    ):
        ODE_SOLVERS.register("euler", FixedStep("euler", 1, ((),), (1.0,)))
