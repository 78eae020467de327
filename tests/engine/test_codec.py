"""Pixels and latents: the scale once, grey levels by the official rule."""

import builtins
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zigflow.codec import AutoencoderKLCodec, IdentityCodec, to_uint8
from zigflow.keyed import KeyedDraws


def batch(pixels=None, latents=None):
    return SimpleNamespace(pixels=pixels, latents=latents)


def test_grey_levels_by_the_official_rule():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_every_grey_level_comes_back():
    levels = torch.arange(256)
    assert to_uint8(levels / 127.5 - 1).tolist() == levels.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_errors(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, value]))


def test_identity_goes_round_with_its_scale():
    pixels = torch.randn(2, 3, 4, 4)
    codec = IdentityCodec(scale=0.5)
    assert torch.equal(codec.encode(batch(pixels)), pixels * 0.5)
    assert torch.equal(codec.decode(codec.encode(batch(pixels))), pixels)
    assert torch.equal(codec.encode(batch(latents=pixels)), pixels * 0.5)
    with pytest.raises(ValueError, match="neither pixels nor latents"):
        codec.encode(batch())
    with pytest.raises(ValueError, match="positive"):
        IdentityCodec(scale=0)


class FakeKL:
    """Stands in for diffusers' autoencoder: mean = pooled pixels, std = 0.5."""

    @classmethod
    def from_pretrained(cls, path, local_files_only):
        assert local_files_only
        return cls()

    def eval(self):
        return self

    def requires_grad_(self, flag):
        return self

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5)))

    def decode(self, z):
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=2))


@pytest.fixture
def diffusers(monkeypatch):
    module = ModuleType("diffusers")
    module.AutoencoderKL = FakeKL
    monkeypatch.setitem(sys.modules, "diffusers", module)


def test_stored_latents_get_the_scale_once(diffusers):
    codec = AutoencoderKLCodec("anywhere")
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(
        codec.encode(batch(pixels=torch.zeros(2, 3, 8, 8), latents=latents)), latents * 0.18215
    )


def test_without_an_autoencoder_stored_latents_are_all_there_is():
    codec = AutoencoderKLCodec().to("cpu")
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(codec.encode(batch(latents=latents)), latents * 0.18215)
    assert codec.latent_shape((3, 16, 24)) == (4, 2, 3)
    assert codec.latent_shape((5, 3, 16, 24)) == (5, 4, 2, 3)
    for call in (lambda: codec.encode(batch(torch.zeros(1, 3, 8, 8))), lambda: codec.decode(latents)):
        with pytest.raises(ValueError, match=r"codec\.path=FOLDER"):
            call()
    with pytest.raises(ValueError, match="divisible by 8"):
        codec.latent_shape((3, 12, 8))


def test_encode_and_decode_undo_the_scale(diffusers):
    codec = AutoencoderKLCodec("anywhere", posterior="mode", chunk=2)
    pixels = torch.randn(5, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(codec.decode(codec.encode(batch(pixels))), pixels, atol=1e-6)
    video = pixels[:4].reshape(2, 2, 3, 4, 4)
    assert codec.encode(batch(video)).shape == (2, 2, 3, 2, 2)
    assert codec.decode(codec.encode(batch(video))).shape == video.shape


def test_the_posterior_draw_is_keyed(diffusers):
    codec = AutoencoderKLCodec("anywhere")
    pixels = torch.randn(4, 3, 4, 4)
    with KeyedDraws(0, torch.tensor([5, 6, 7, 8])).active():
        together = codec.encode(batch(pixels))
    with KeyedDraws(0, torch.tensor([7])).active():
        alone = codec.encode(batch(pixels[2:3]))
    assert torch.equal(alone, together[2:3])
    assert not torch.equal(codec.encode(batch(pixels)), together)


def test_a_missing_diffusers_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"zigflow\[codec\]"):
        AutoencoderKLCodec("anywhere")
    with pytest.raises(ValueError, match="posterior"):
        AutoencoderKLCodec("anywhere", posterior="median")


def test_latents_are_drawn_from_stored_moments_by_the_sample():
    mean, log_variance = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2) * 30
    stored = SimpleNamespace(pixels=None, latents=None, moments=torch.cat([mean, log_variance], dim=1))
    draws = KeyedDraws(0, torch.tensor([5, 6, 7]))
    wanted = mean + (log_variance.clamp(-30, 20) / 2).exp() * draws.normal("codec.encode", (4, 2, 2))
    for codec in (AutoencoderKLCodec(scale=0.5), IdentityCodec(scale=0.5)):
        with draws.active():
            together = codec.encode(stored)
        assert torch.equal(together, wanted * 0.5)
        one = SimpleNamespace(pixels=None, latents=None, moments=stored.moments[1:2])
        with KeyedDraws(0, torch.tensor([6])).active():
            assert torch.equal(codec.encode(one), together[1:2])
        with KeyedDraws(0, torch.tensor([8])).active():
            assert not torch.equal(codec.encode(one), together[1:2])
    assert torch.equal(AutoencoderKLCodec(scale=0.5, posterior="mode").encode(stored), mean * 0.5)
