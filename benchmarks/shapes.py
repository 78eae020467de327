"""The shapes (B, L, E, N) of the tables of a GPU: batch, tokens, channels, states."""

SHAPES = [
    (16, 1024, 1536, 16),
    (64, 256, 1536, 16),
    (8, 4096, 1536, 16),
    (1, 1024, 1536, 16),
    (16, 1024, 3072, 16),
]
