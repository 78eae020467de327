"""Wrote tests/golden/checkpoint_v1, once, with format version 1. Run it again only for a new format, under a new name.

python -m tests.golden.make_checkpoint_v1 FOLDER
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from model_zigma import ZigMa
from tests.engine.toys import make_trainer
from zigflow.engine import checkpoint
from zigflow.engine.ema import EmaProfile
from zigflow.engine.run_state import load_weights
from zigflow.engine.sampling_run import weights_hash
from zigflow.processes.flow import Flow

STEPS = 3


def golden_model(seed):
    torch.manual_seed(seed)
    return ZigMa(
        in_channels=1, img_dim=4, embed_dim=8, depth=2, patch_size=1, scan_type="zigzagN8", use_pe=2, num_classes=3,
        class_dropout_prob=0.3, drop_path_rate=0.2,
    )  # fmt: skip


def golden_trainer(folder, steps, seed, hooks=()):
    profile = EmaProfile("short", half_life=20, ramp=0.5)
    return make_trainer(
        folder, steps=steps, model=golden_model(seed), process=Flow(), ema=(profile,),
        epoch_size=10, data_identity={"fingerprint": "golden"}, config={"model": {"name": "golden"}}, hooks=hooks,
    )  # fmt: skip


def main():
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        golden_trainer(Path(folder), STEPS, 0).fit()
        found = checkpoint.open_checkpoint(folder)
        shutil.copytree(found.path, target / found.path.name)
        losses = []
        again = golden_trainer(
            Path(folder), STEPS + 2, 9, hooks=[lambda t, r: losses.append([r.loss, r.grad_norm])]
        )
        again.fit()
    stored = checkpoint.Checkpoint(target / found.path.name)
    want = {"next loss and gradient norm": losses}
    for weights in ("model", "short"):
        model = golden_model(5)
        load_weights(model, stored, weights)
        want[weights] = weights_hash(model)
    (target / "expected.json").write_text(json.dumps(want, indent=1) + "\n")


if __name__ == "__main__":
    main()
