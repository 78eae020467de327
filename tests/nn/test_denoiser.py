"""The protocol of backbones: its members, their defaults, models that have only what is required, and the check."""

import inspect

import pytest
import torch
from torch import nn

from model_zigma import ZigMa
from tests.models.transformers import FAMILIES
from zigflow.engine.combined import hidden_matrices
from zigflow.engine.run_state import scan_state
from zigflow.engine.scan_order import scan_facts
from zigflow.engine.sharding import prepare_blocks
from zigflow.nn import Denoiser, as_denoiser, check_denoiser
from zigflow.nn.checkpointing import CheckpointedBlock
from zigflow.nn.denoiser import MEMBERS, DenoiserDefaults
from zigflow.nn.flops import one_sample
from zigflow.nn.resizing import Resizing
from zigflow.processes import Flow, VariancePreserving
from zigflow.samplers.guidance import Guided
from zigflow.shapes import data_form, frames_of, model_shape, sample_shape, token_grid

SIZES = {"in_channels": 2, "img_dim": (4, 6), "patch_size": 2, "embed_dim": 16, "depth": 3}


class Plain(nn.Module):
    """The required members alone."""

    in_channels, img_dim = 2, 4

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, y=None):
        return self.scale * x


def test_every_member_but_the_required_has_a_default_of_its_kind():
    assert "sample_shape" in MEMBERS
    for name in MEMBERS - {"forward"}:
        asked, given = vars(Denoiser)[name], inspect.getattr_static(DenoiserDefaults, name)
        assert inspect.isfunction(asked) == inspect.isfunction(given), name
        if inspect.isfunction(asked):
            assert list(inspect.signature(asked).parameters) == list(inspect.signature(given).parameters), (
                name
            )
        assert (asked.fget if isinstance(asked, property) else asked).__doc__, f"{name} is not described"


def test_a_plain_module_is_asked_like_any_other_and_stays_as_it_is():
    model = Plain()
    before = dict(vars(model))
    asked = check_denoiser(model)
    assert (asked.sample_shape, asked.num_classes, asked.has_text) == ((2, 4, 4), -1, False)
    assert (asked.time_scale, asked.time_factor, asked.guided_channels) == (1.0, 1.0, None)
    assert (asked.scan_name, asked.scan_walks(), asked.scan_state()) == ("", None, {})
    assert (asked.named_blocks(), asked.shard_units(), asked.token_grid) == ({}, [], None)
    assert asked.resizing() == Resizing()
    assert asked.has_null is False
    with pytest.raises(ValueError, match="no null condition"):
        asked.null_condition(torch.tensor([0]))
    with pytest.raises(ValueError, match="Plain has no long skip"):
        asked.set_skip_tuning("as_intended", (0.8, 1.0))
    with pytest.raises(ValueError, match=r"checkpoint_policy=block needs set_checkpoint_policy.*Plain"):
        prepare_blocks(model, "block", False)
    with pytest.raises(ValueError, match="compile=true needs a model with blocks.*Plain"):
        prepare_blocks(model, "none", True)
    with pytest.raises(ValueError, match="Plain for an output without condition"):
        Guided(model, 2.0)
    assert scan_facts(model) is None and scan_state(model) == {} and hidden_matrices(model) == []
    assert one_sample(model)[0].shape == (1, 2, 4, 4)
    assert vars(model).keys() == before.keys()


def test_what_a_model_says_itself_goes_before_the_default():
    class Blocks(Plain):
        time_scale, time_factor, num_classes, has_text = 1000.0, 10.0, 3, True
        sample_shape = (5, 2, 4, 4)
        d_context, n_context_token = 6, 7

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def null_condition(self, y):
            return y - y

    asked = as_denoiser(Blocks())
    assert list(asked.named_blocks()) == ["blocks.0", "blocks.1"]
    assert asked.has_null and asked.null_condition(torch.ones(2)).tolist() == [0, 0]
    x, _, y = one_sample(Blocks())
    assert (x.shape, y.shape) == ((1, 5, 2, 4, 4), (1, 7, 6))
    t = torch.tensor([0.25])
    flow, diffusion = Flow(), VariancePreserving()
    assert flow.time_map(t, Blocks()).item() == 250
    assert diffusion.time_map(t, Blocks()).item() == pytest.approx(diffusion.time_map(t, Plain()).item() / 10)
    guided = Guided(Blocks(), 2.0, process=flow)
    assert flow.time_map(t, guided).item() == 250
    assert flow.process_time(flow.time_map(t, guided), guided).item() == 0.25


def test_functions_are_asked_too():
    def network(x, t, y=None):
        return x

    assert Flow().time_map(torch.tensor([0.5]), network).item() == 0.5
    with pytest.raises(ValueError, match="null_condition"):
        Guided(network, 2.0)
    network.null_condition = lambda y: y
    assert Guided(network, 2.0).active


def test_a_property_that_fails_is_not_answered_by_the_default():
    class Broken(Plain):
        @property
        def time_scale(self):
            return self.nothing

    with pytest.raises(AttributeError):
        _ = as_denoiser(Broken()).time_scale


def test_blocks_of_ones_own_keep_a_policy():
    class Block(CheckpointedBlock):
        def layer(self, x):
            return 2 * x

    class Stack(Plain):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

    model = Stack()
    prepare_blocks(model, "block", False)
    assert [b.checkpoint_policy for b in model.blocks] == ["block", "block"]
    with pytest.raises(KeyError, match="selective"):
        prepare_blocks(model, "selectiv", False)
    assert as_denoiser(model).shard_units() == list(model.blocks)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"forward": lambda self, x: x}, r"Odd\.forward\(x\).*forward\(x, t, y=None"),
        ({"forward": lambda self, x, t, label: x}, r"Odd\.forward\(x, t, label\)"),
        ({"in_channels": None}, "Odd does not say what it reads: give it sample_shape"),
        ({"img_dim": (4, 4, 4)}, "in_channels and img_dim"),
        ({"sample_shape": (4, 4)}, r"sample_shape is \(C, H, W\).*got \(4, 4\)"),
        ({"sample_shape": (1, 0, 4)}, r"got \(1, 0, 4\)"),
    ],
)
def test_a_model_without_the_required_members_is_refused_in_one_line(changes, message):
    model = type("Odd", (Plain,), changes)()
    with pytest.raises(ValueError, match=message) as error:
        check_denoiser(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_all_members_itself(name):
    model = FAMILIES[name](**SIZES)
    assert as_denoiser(model) is model
    asked = check_denoiser(model)
    assert (asked.sample_shape, asked.token_grid) == ((2, 4, 6), (1, 2, 3))
    blocks = asked.named_blocks()
    assert list(blocks) and all(model.get_submodule(path) is block for path, block in blocks.items())
    assert asked.shard_units() == list(blocks.values())
    sizes = asked.resizing()
    parameters = dict(model.named_parameters())
    assert [p for p in parameters if sizes.is_output(p)], "the layer that gives pixels is named"
    other = FAMILIES[name](**{**SIZES, "img_dim": 8})
    changed = {p for p, value in other.named_parameters() if value.shape != parameters[p].shape}
    assert changed == {p for p in changed if sizes.is_positions(p)}, "tables that follow the grid are named"


def test_videos_are_longer_by_their_frames():
    model = ZigMa(**SIZES, video_frames=3, tpe=True, use_pe=3)
    assert (model.sample_shape, model.token_grid) == ((3, 2, 4, 6), (3, 2, 3))
    assert as_denoiser(model).shard_units() == []
    sizes = model.resizing()
    tables = [name for name, _ in model.named_parameters() if sizes.is_positions(name)]
    assert tables == [f"blocks.{i}.pos_embed" for i in range(3)]
    assert sizes.is_frames("temporal_pos_embedding")


@pytest.mark.parametrize("frames", [0, 3, None])
@pytest.mark.parametrize("size", [4, [4, 6], (4, 6)])
def test_a_configuration_and_its_model_have_one_shape(size, frames):
    node = {"in_channels": 2, "img_dim": size, "video_frames": frames, "patch_size": 2, "num_classes": 5}
    model = ZigMa(**SIZES | {"img_dim": tuple(size) if size != 4 else 4}, video_frames=frames or 0)
    assert model_shape(node) == model.sample_shape
    assert token_grid(node) == model.token_grid
    assert frames_of(model.sample_shape) == (frames or 0)
    assert data_form(node) == {"video_frames": frames or 0, "num_classes": 5}


def test_what_a_configuration_leaves_open_has_no_shape():
    assert sample_shape(None, 4) is None and sample_shape(3, None) is None and sample_shape(3, [4]) is None
    assert model_shape({"img_dim": "follows", "in_channels": 3}) is None
    for node in ({}, {"img_dim": 4}, {"img_dim": 4, "patch_size": 0}, {"img_dim": None, "patch_size": 2}):
        assert token_grid(node) is None
