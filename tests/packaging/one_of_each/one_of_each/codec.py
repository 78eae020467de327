"""A codec: ``codec=each_negative`` (config/codec/each_negative.yaml)."""


class Negative:
    """The network sees negatives."""

    scale = 1.0

    def encode(self, batch):
        return -batch.pixels

    def decode(self, x):
        return -x
