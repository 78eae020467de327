"""One of two processes that train each family; started by test_families.py with the folder to write in."""

import sys
from pathlib import Path

import torch
from torch import distributed

from tests.engine.shard_worker import close, trained
from tests.engine.test_families import FAMILIES
from tests.engine.toys import assert_same_bits
from zigflow.engine.launch import make_accelerator
from zigflow.engine.ranks import Ranks

# The transformers' shards are held against whole ones in tests/models/test_sharded.py.
RESHARDED = ("dim", "dis")


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator, ranks = make_accelerator(), Ranks()
    assert ranks.size == 2
    for family, build in FAMILIES.items():
        states = {}
        for name, sharded, stops in (("whole", False, (2,)), ("shards", True, (2,)), ("cut", True, (1, 2))):
            for seed, steps in enumerate(stops):
                _, states[name] = trained(
                    folder / family / name, ranks, accelerator, steps, sharded=sharded, model=build(seed)
                )
            if family not in RESHARDED:
                break
        else:
            close(states["shards"], states["whole"])
            assert_same_bits(states["cut"], states["shards"])
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
