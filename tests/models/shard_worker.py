"""One of two processes; started by test_sharded.py. Sharded models give what whole ones give."""

import torch
from torch import distributed

from tests.assertions import assert_close
from tests.models.test_transformers import CASES, tiny
from tests.models.transformers import inputs, run
from zigflow.engine.launch import make_accelerator
from zigflow.engine.sharding import shard
from zigflow.samplers.guidance import Guided


def main():
    torch.set_num_threads(1)
    assert make_accelerator().num_processes == 2
    for case in CASES:
        whole, sharded = tiny(case), tiny(case)
        shard(sharded, 2)
        block = next(p for p in sharded.shard_units()[0].parameters() if p.ndim > 1)
        assert block.to_local().numel() < block.numel()
        want, want_gradients = run(whole.train())
        got, gradients = run(sharded.train())
        assert_close(case, got, want, of_max=1e-5)
        assert gradients.keys() == want_gradients.keys()
        for name, value in want_gradients.items():
            own = gradients[name]
            own = own.full_tensor() if hasattr(own, "full_tensor") else own
            assert_close(f"{case} {name}", own, value, of_max=1e-4)
        if whole.class_dropout_prob:
            given = inputs(whole)
            with torch.no_grad():
                outs = [Guided(m.eval(), 3.0, channels=m.guided_channels)(*given) for m in (sharded, whole)]
            assert_close(f"{case} guided", *outs, of_max=1e-5)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
