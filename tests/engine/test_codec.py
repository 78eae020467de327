"""Pixels and latents: the scale once, grey levels by the official rule."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zigflow.codec import AutoencoderKLCodec, IdentityCodec, to_uint8
from zigflow.keyed import KeyedDraws
from zigflow.latents import LatentScale


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
def diffusers(monkeypatch, tmp_path):
    module = ModuleType("diffusers")
    module.AutoencoderKL = FakeKL
    monkeypatch.setitem(sys.modules, "diffusers", module)
    return said(tmp_path / "vae")


def said(folder, **config):
    """A folder whose config.json says this."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_stored_latents_get_the_scale_once(diffusers):
    codec = AutoencoderKLCodec(diffusers)
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
    codec = AutoencoderKLCodec(diffusers, posterior="mode", chunk=2)
    pixels = torch.randn(5, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(codec.decode(codec.encode(batch(pixels))), pixels, atol=1e-6)
    video = pixels[:4].reshape(2, 2, 3, 4, 4)
    assert codec.encode(batch(video)).shape == (2, 2, 3, 2, 2)
    assert codec.decode(codec.encode(batch(video))).shape == video.shape


def test_the_posterior_draw_is_keyed(diffusers):
    codec = AutoencoderKLCodec(diffusers)
    pixels = torch.randn(4, 3, 4, 4)
    with KeyedDraws(0, torch.tensor([5, 6, 7, 8])).active():
        together = codec.encode(batch(pixels))
    with KeyedDraws(0, torch.tensor([7])).active():
        alone = codec.encode(batch(pixels[2:3]))
    assert torch.equal(alone, together[2:3])
    assert not torch.equal(codec.encode(batch(pixels)), together)


def test_a_missing_diffusers_names_the_extra(monkeypatch, tmp_path):
    diffusers = said(tmp_path / "vae")
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"zigflow\[codec\]"):
        AutoencoderKLCodec(diffusers)
    with pytest.raises(ValueError, match="posterior"):
        AutoencoderKLCodec(diffusers, posterior="median")


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


SAID = {
    "sd": ({"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None}, (0.18215, 0, 0, 1)),
    "sdxl": ({"scaling_factor": 0.13025}, (0.13025, 0, 0, 1)),
    "old": ({}, (0.18215, 0, 0, 1)),
    "shift": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.3611, 0.1159, 0, 1)),
    "statistics": (
        {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.3, 2.0], "latents_std": [8.4, 5.2, 2.0]},
        (0.5, 0, torch.tensor([-1.6, 1.3, 2.0])[:, None, None], torch.tensor([8.4, 5.2, 2.0])[:, None, None]),
    ),
}


@pytest.mark.parametrize("config, by", SAID.values(), ids=SAID)
def test_latents_are_scaled_as_the_autoencoder_says_both_ways(config, by, diffusers, tmp_path):
    scale, shift, mean, std = by
    codec = AutoencoderKLCodec(said(tmp_path / "vae", **config), posterior="mode")
    pixels = torch.randn(2, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = ((pixels[..., ::2, ::2] - mean) / std - shift) * scale
    for given in (batch(pixels), batch(latents=pixels[..., ::2, ::2])):
        assert torch.allclose(codec.encode(given), wanted, rtol=1e-6)
    assert torch.allclose(codec.decode(wanted), pixels, atol=1e-5)
    video = pixels.reshape(1, 2, 3, 4, 4)
    assert torch.allclose(codec.encode(batch(video)), wanted[None], rtol=1e-6)
    assert torch.allclose(codec.decode(wanted[None]), video, atol=1e-5)
    # What is recorded is what is read again, with the autoencoder and without.
    node = codec.latent_scale.node()
    assert LatentScale.of(tmp_path / "vae", **node) == LatentScale.of(None, **node) == codec.latent_scale


def test_what_contradicts_the_autoencoder_is_refused_with_both_values(tmp_path):
    for given, config, parts in (
        ({"scale": 0.18215}, {"scaling_factor": 0.13025}, ("codec.scale=0.18215", "scaling_factor=0.13025")),
        ({"shift": 0.0}, {"shift_factor": 0.1159}, ("codec.shift=0.0", "shift_factor=0.1159")),
        ({"shift": 0.1}, {}, ("codec.shift=0.1", "shift_factor=0.0")),
        ({"shift": 0.0}, SAID["statistics"][0], ("codec.shift=0.0", "latents_mean=[-1.6, 1.3, 2.0]")),
        (
            {"latents_mean": [0.0], "latents_std": [1.0]},
            {},
            ("codec.latents_mean=[0.0]", "latents_mean=None"),
        ),
    ):
        folder = said(tmp_path / "vae", **config)
        with pytest.raises(ValueError) as error:
            LatentScale.of(folder, **given)
        assert all(part in str(error.value) for part in (*parts, folder, "codec.own_scale=true"))
        kept = LatentScale.of(folder, **given, own_scale=True)
        assert kept == LatentScale.of(None, **given)
    # A factor that an old config leaves out is not said; a file of weights says nothing either.
    assert LatentScale.of(said(tmp_path / "vae"), scale=0.5).scale == 0.5
    assert LatentScale.of("weights.pth", scale=0.5, shift=0.25) == LatentScale(0.5, 0.25)
    assert LatentScale.of(None) == LatentScale(0.18215)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"scaling_factor": "large"}, "could not convert"),
        ({"scaling_factor": 0}, "scale must be positive"),
        ({"shift_factor": float("inf")}, "shift must be finite"),
        ({"latents_mean": [0.0]}, "belong together"),
        ({"latents_mean": [0.0, 1.0], "latents_std": [1.0, 0.0]}, "2 positive numbers"),
        ({"latents_mean": [0.0], "latents_std": [1.0], "latent_channels": 4}, "latent_channels is 4"),
        ({"latents_mean": [0.0], "latents_std": [1.0], "shift_factor": 1}, "exclude each other"),
        ({"_class_name": "AutoencoderDC"}, "describes a diffusers AutoencoderDC"),
    ],
)
def test_a_config_that_says_what_cannot_be_applied_is_refused(config, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        LatentScale.of(said(tmp_path / "vae", **config))
    assert "config.json" in str(error.value)


def test_statistics_of_another_number_of_channels_are_an_error():
    codec = AutoencoderKLCodec(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    with pytest.raises(ValueError, match="4 channels, the autoencoder's statistics 3"):
        codec.encode(batch(latents=torch.zeros(1, 4, 2, 2)))


def test_own_scale_without_a_scale_is_refused(tmp_path):
    """The name invites to read it as the autoencoder's own scale, which needs no key."""
    for path in (None, tmp_path):
        with pytest.raises(ValueError, match="own_scale=true keeps the scale that is stated, and none is"):
            LatentScale.of(path, own_scale=True)
