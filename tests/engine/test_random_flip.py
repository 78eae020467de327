"""Mirrored samples: by keyed draw, of pixels alone, the same after a resume."""

import pytest
import torch

from zigflow import plugins
from zigflow.data.batch import Batch, flipped
from zigflow.keyed import KeyedDraws
from zigflow.settings import SettingsError


def batch(shape=(3, 4, 5), count=64):
    pixels = torch.rand(count, *shape)
    return Batch(pixels, None, torch.arange(count), None, torch.arange(count), tuple(map(str, range(count))))


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)])
def test_each_sample_is_itself_or_its_mirror_image(shape):
    given = batch(shape)
    got = flipped(given, KeyedDraws(0, given.ids))
    same = (got.pixels == given.pixels).flatten(1).all(1)
    turned = (got.pixels == given.pixels.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all(), "a video's frames go together"
    assert 16 < same.sum() < 48
    assert got.labels is given.labels


def test_the_draw_belongs_to_the_sample():
    given = batch()
    whole = flipped(given, KeyedDraws(0, given.ids)).pixels
    part = Batch(given.pixels[40:44], None, None, None, given.ids[40:44], given.keys[40:44])
    assert torch.equal(flipped(part, KeyedDraws(0, part.ids)).pixels, whole[40:44])
    other = flipped(given, KeyedDraws(1, given.ids)).pixels
    assert not torch.equal(other, whole)


def test_the_key_reaches_the_loss(tmp_path):
    """With a flip the second step sees another image, and so does the loss; without, nothing changes."""
    from tests.test_any_process import train

    def losses(name, *overrides):
        lines = train(tmp_path / name, 2, ["process=flow", *overrides])
        return [line["loss"] for line in lines if "loss" in line]

    plain = losses("plain")
    assert losses("off", "data.random_flip=false") == plain
    assert losses("on", "data.random_flip=true") != plain


def test_latents_are_not_mirrored():
    with pytest.raises(SettingsError, match=r"data\.random_flip=true.*latents.*mirrored"):
        plugins.check_command_line(["data=imagenet256_features", "+data.random_flip=true"], "default")
    latents = Batch(None, torch.zeros(1, 4, 2, 2), None, None, torch.arange(1), ("0",))
    with pytest.raises(ValueError, match=r"data\.random_flip=false"):
        flipped(latents, KeyedDraws(0, latents.ids))
