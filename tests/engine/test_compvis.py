"""The autoencoder in CompVis layout: names and sizes of the manifest, and the function, written out here."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from zigflow.codec import AutoencoderKLCodec
from zigflow.compvis import diffusers_layout, diffusers_weights, read_autoencoder
from zigflow.keyed import KeyedDraws
from zigflow.latents import LatentSize

MANIFEST = (
    Path(__file__).parents[1] / "parity" / "fixtures" / "dit_uvit" / "manifests" / "autoencoder_kl.json"
)


def manifest_tensors():
    shapes = json.loads(MANIFEST.read_text())["state_dict"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def compvis_shapes(widths, blocks, latent=4):
    """Names and shapes of a CompVis autoencoder of any size, from the published definition."""
    shapes = {}

    def conv(name, out, into, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, size, size), (out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def resnet(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name, width):
        resnet(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        resnet(f"{name}.block_2", width, width)

    conv("encoder.conv_in", widths[0], 3, 3)
    width = widths[0]
    for level, wide in enumerate(widths):
        for block in range(blocks):
            resnet(f"encoder.down.{level}.block.{block}", width, wide)
            width = wide
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", 2 * latent, width, 3)
    conv("decoder.conv_in", width, latent, 3)
    middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", 3, width, 3)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    return shapes


def random_weights(widths=(32, 64), blocks=1):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in compvis_shapes(widths, blocks).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            value /= (shape[1] * shape[2] * shape[3]) ** 0.5
        weights[name] = value
    return weights


class CompVis:
    """The published network as functions of its weights."""

    def __init__(self, weights):
        self.w = {name: value.double() for name, value in weights.items()}
        self.levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.w else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5
        out = torch.einsum("bij,bcj->bci", scores.softmax(-1), v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", out)

    def middle(self, name, x):
        x = self.attention(f"{name}.attn_1", self.resnet(f"{name}.block_1", x))
        return self.resnet(f"{name}.block_2", x)

    def blocks(self, name, x):
        number = 0
        while f"{name}.{number}.conv1.weight" in self.w:
            x = self.resnet(f"{name}.{number}", x)
            number += 1
        return x

    def moments(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            x = self.blocks(f"encoder.down.{level}.block", x)
            if level < self.levels - 1:
                # One row and column more at the far ends only.
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def decode(self, z):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(self.levels)):
            x = self.blocks(f"decoder.up.{level}.block", x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


def batch(pixels=None, moments=None):
    return SimpleNamespace(pixels=pixels, latents=None, moments=moments)


def test_names_shapes_and_totals_are_those_of_the_manifest():
    from diffusers import AutoencoderKL

    tensors, manifest = manifest_tensors(), json.loads(MANIFEST.read_text())
    layout = diffusers_layout(tensors)
    assert layout["block_out_channels"] == tuple(128 * m for m in manifest["ddconfig"]["ch_mult"])
    assert layout["layers_per_block"] == manifest["ddconfig"]["num_res_blocks"]
    assert layout["latent_channels"] == manifest["ddconfig"]["z_channels"]
    mapped = diffusers_weights(tensors)
    with torch.device("meta"):
        built = AutoencoderKL(**layout).state_dict()
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in built.items()}
    assert len(mapped) == 248
    assert sum(v.numel() for v in mapped.values()) == manifest["params_total"] == 83_653_863
    assert compvis_shapes((128, 256, 512, 512), 2) == {k: tuple(v.shape) for k, v in tensors.items()}


@pytest.mark.parametrize("widths, blocks", [((32, 64), 1), ((32, 32, 64), 2)])
def test_the_codec_computes_the_published_function(widths, blocks, tmp_path):
    weights = random_weights(widths, blocks)
    torch.save(weights, tmp_path / "autoencoder_kl.pth")
    codec = AutoencoderKLCodec(str(tmp_path / "autoencoder_kl.pth"), scale=0.2301)
    factor = 2 ** (len(widths) - 1)
    assert codec.latent_shape((3, 16, 8)) == (4, 16 // factor, 8 // factor)
    published = CompVis(weights)
    pixels = torch.rand(3, 3, 16, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = published.moments(pixels.double())
    mean, log_variance = moments.chunk(2, dim=1)
    draws = KeyedDraws(3, torch.tensor([5, 1, 9]))
    noise = draws.normal("codec.encode", tuple(mean.shape[1:]))
    wanted = 0.2301 * (mean + (log_variance.clamp(-30, 20) / 2).exp() * noise)
    with draws.active():
        latents = codec.encode(batch(pixels))
        stored = codec.encode(batch(moments=moments.float()))
    torch.testing.assert_close(latents.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored, latents, rtol=1e-4, atol=1e-4)
    decoded = published.decode(latents.double() / 0.2301)
    torch.testing.assert_close(codec.decode(latents).double(), decoded, rtol=1e-4, atol=1e-4)


def test_the_file_and_the_folder_of_one_autoencoder_agree(tmp_path):
    torch.save(random_weights(), tmp_path / "a.pth")
    of_file = AutoencoderKLCodec(str(tmp_path / "a.pth"), posterior="mode")
    of_file._vae.save_pretrained(tmp_path / "folder")
    of_folder = AutoencoderKLCodec(str(tmp_path / "folder"), posterior="mode")
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(of_file.encode(batch(pixels)), of_folder.encode(batch(pixels)))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch PWNED",))


def test_the_size_of_the_latents_is_known_before_a_file_is_read(tmp_path):
    (tmp_path / "autoencoder_kl.pth").touch()
    assert LatentSize.of(tmp_path / "autoencoder_kl.pth") == LatentSize(4, 8)
    with pytest.raises(ValueError, match=r"there is no file .*none\.pth"):
        LatentSize.of(tmp_path / "none.pth")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        LatentSize.of(tmp_path / "folder.ckpt")


def test_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_autoencoder(path)
    torch.save({**random_weights(), "evil": Evil()}, path)
    with pytest.raises(ValueError, match="refused as an autoencoder"):
        read_autoencoder(path)
    assert not (tmp_path / "PWNED").exists()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="refused as an autoencoder"):
        read_autoencoder(path)
    torch.save({"state_dict": {}, "epoch": 1}, path)
    with pytest.raises(ValueError, match="something else than tensors"):
        read_autoencoder(path)
    torch.save({"blocks.0.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no weights of a CompVis autoencoder.*blocks\.0\.weight"):
        read_autoencoder(path)
    for name in ("loss.logvar", "encoder.mid.attn_1.queries.weight"):
        torch.save({**random_weights(), name: torch.ones(1)}, path)
        with pytest.raises(ValueError, match=f"'{name}' is no weight"):
            read_autoencoder(path)
    weights = random_weights()
    del weights["decoder.up.1.block.0.conv1.bias"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"does not hold all.*up_blocks\.0\.resnets\.0\.conv1\.bias"):
        AutoencoderKLCodec(str(path))
