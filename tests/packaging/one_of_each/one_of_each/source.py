"""A data source: ``data=each_stripes`` (config/data/each_stripes.yaml)."""

import torch


class Stripes:
    """Stripes whose direction is the label."""

    num_classes = 2

    def __init__(self, num_samples, size):
        self.num_samples = num_samples
        self.image_shape = (1, size, size)
        self.shard_sizes = (num_samples,)
        self.fingerprint = f"stripes-{num_samples}-{size}"

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        _, height, width = self.image_shape
        stripes = ((torch.arange(width) + index // 2) % 2 * 2.0 - 1).expand(1, height, width)
        label = index % 2
        return {
            "key": f"stripes-{index}",
            "pixels": (stripes.mT if label else stripes).contiguous(),
            "labels": label,
        }
