"""Compilation of a model's blocks in place."""

from collections.abc import Iterable

from torch import nn

_GRAPHS_KEPT = 128


def compile_in_place(blocks: Iterable[nn.Module], **options) -> None:
    """Compile each block, whole; keys of the state dict stay as they are.

    Blocks that share their code share its graphs: up to three of a model, again for sampling, for another number of
    samples, for another grid, and those of every other model in the process. Dynamo keeps 8 by default, and the ninth
    is an error for code that is compiled whole.
    """
    # Costs a second, and only who compiles pays it.
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _GRAPHS_KEPT)
    for block in blocks:
        block.compile(fullgraph=True, **options)
