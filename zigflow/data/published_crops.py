"""The center crops that published models' data were made with, for comparable numbers; PIL images in and out.

``cover`` is ours (:func:`zigflow.data.decode.cover_crop`): crop, then one antialiased bicubic resize.
"""

from collections.abc import Callable
from typing import Any

from .decode import cover_crop


def halving_crop(image: Any, size: int) -> Any:
    """ADM's and DiT's ImageNet: halve by boxes while twice too large, bicubic to the size, cut out the center."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def lanczos_crop(image: Any, size: int) -> Any:
    """U-ViT's COCO: cut out the central square, Lanczos to the size."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def aligned_face_crop(image: Any, size: int) -> Any:
    """U-ViT's and DDIM's CelebA: of an aligned image (178 wide, 218 high) the 128 pixels about the face, bilinear."""
    from PIL import Image

    if image.size != (178, 218):
        raise ValueError(
            f"the celeba crop is that of the aligned images, 178 x 218, this one is {image.width} x {image.height}; "
            "use another crop"
        )
    return image.crop((25, 57, 153, 185)).resize((size, size), Image.Resampling.BILINEAR)


CROPS: dict[str, Callable[[Any, int], Any]] = {
    "cover": lambda image, size: cover_crop(image, size, size),
    "adm": halving_crop,
    "lanczos": lanczos_crop,
    "celeba": aligned_face_crop,
}
