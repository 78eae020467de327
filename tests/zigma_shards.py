"""Shards in the layouts of the ZigMa data sets: true shapes and suffixes, small random content; a tiny autoencoder."""

from pathlib import Path

import numpy as np

from zigflow.data.writer import ShardWriter, encode_npy

CELEBA_TEXT, TEXT = "caption_clip_feature.npy", "caption_feature.npy"
# data= -> suffix and shape of the latents, suffix of the text features.
LAYOUTS = {
    "celebamm256": ("img_feature256.npy", (4, 32, 32), CELEBA_TEXT),
    "celebamm256_uncond": ("img_feature256.npy", (4, 32, 32), None),
    "celebamm512": ("img_feature512.npy", (4, 64, 64), CELEBA_TEXT),
    "celebamm512_uncond": ("img_feature512.npy", (4, 64, 64), None),
    "churches256": ("img_feature256.npy", (4, 32, 32), None),
    "coco14": ("img_feature256.npy", (4, 32, 32), TEXT),
    "coco": ("img_feature256.npy", (4, 32, 32), TEXT),
    "facehq_1024": ("latent.npy", (4, 128, 128), None),
    "landscapehq_1024": ("latent_hr.npy", (4, 128, 128), None),
    "ucf101": ("frame_feature256.npy", (16, 4, 32, 32), None),
}


def write_shards(folder: Path, data: str, samples: int = 4) -> Path:
    """``samples`` samples of ``data``, with the members that the published sets have beside what is read."""
    suffix, shape, text = LAYOUTS[data]
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=2, prefix="train") as writer:
        for index in range(samples):
            members = {suffix: encode_npy(rng.standard_normal(shape, dtype=np.float32))}
            if text:
                members[text] = encode_npy(rng.standard_normal((2, 77, 768), dtype=np.float32))
                members["caption.json"] = b'["a face", "another caption"]'
            if data == "ucf101":
                members["cls_id.cls"] = str(index * 33 % 101).encode()
                members["cls_name.json"] = b'"Archery"'
            writer.add(f"{index:06d}", members)
    return folder


def save_autoencoder(folder: Path, factor: int = 8) -> Path:
    """A random AutoencoderKL with the latents of Stable Diffusion and hardly any weights."""
    import torch
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(4,) * levels, layers_per_block=1, norm_num_groups=2, latent_channels=4,
            mid_block_add_attention=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder
