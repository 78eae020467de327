"""Precision, recomputation and compilation: chosen when a run starts, or changed when it resumes."""

import pytest
import torch

from model_zigma import ZigMa
from tests.engine.toys import PROFILES, assert_same_bits, make_trainer, snapshot
from zigflow.engine import checkpoint
from zigflow.processes.flow import Flow


def zigma(seed=0):
    torch.manual_seed(seed)
    return ZigMa(
        in_channels=1, img_dim=4, embed_dim=16, depth=4, patch_size=1, scan_type="zigzagN8", use_pe=2, num_classes=3,
        class_dropout_prob=0.3, drop_path_rate=0.2,
    )  # fmt: skip


def fit(folder, steps, **options):
    trainer = make_trainer(
        folder, steps=steps, model=zigma(), process=Flow(), ema=PROFILES, grad_accum=2, **options
    )
    trainer.fit()
    return trainer


def close(got, want, tolerance=2e-5):
    assert set(got) == set(want)
    for name, value in want.items():
        if name != "generator":
            assert torch.allclose(got[name].double(), value.double(), atol=tolerance), name


@pytest.mark.parametrize("before, after", [("none", "block"), ("block", "selective"), ("selective", "none")])
def test_the_checkpoint_policy_may_change_on_resume(tmp_path, before, after):
    """Recomputing repeats the same operations, so on the CPU even the bits stay."""
    want = snapshot(fit(tmp_path / "straight", 4))
    fit(tmp_path / "changed", 2, checkpoint_policy=before)
    assert_same_bits(snapshot(fit(tmp_path / "changed", 4, checkpoint_policy=after)), want)


@pytest.fixture
def traced(monkeypatch):
    """``compile=True`` with the compiler's front end and autograd, without generating code: seconds, not minutes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain = ZigMa.compile_blocks
    monkeypatch.setattr(ZigMa, "compile_blocks", lambda self: plain(self, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_compilation_may_change_on_resume(tmp_path, traced, policy):
    want = snapshot(fit(tmp_path / "straight", 4))
    assert traced.frame_count == 0
    fit(tmp_path / "changed", 2, compile=True, checkpoint_policy=policy)
    assert 1 <= traced.frame_count <= 3
    names = set(checkpoint.open_checkpoint(tmp_path / "changed").tensors("model"))
    assert not any("_orig_mod" in name for name in names)
    close(snapshot(fit(tmp_path / "changed", 4)), want)


@pytest.mark.slow
def test_real_compilation_started_on_resume(tmp_path):
    torch._dynamo.reset()
    want = snapshot(fit(tmp_path / "straight", 4))
    fit(tmp_path / "changed", 2)
    close(snapshot(fit(tmp_path / "changed", 4, compile=True, checkpoint_policy="selective")), want, 1e-4)


def stored_in_float32(folder, precision):
    stored = checkpoint.open_checkpoint(folder)
    assert stored.trainer["mixed_precision"] == precision
    return {v.dtype for v in stored.tensors("model").values() if v.is_floating_point()} == {torch.float32}


def test_bfloat16_may_be_left_on_resume(tmp_path):
    """It trains near float32, its checkpoint holds float32, and the run goes on in float32."""
    want = snapshot(fit(tmp_path / "straight", 4))
    fit(tmp_path / "changed", 2, mixed_precision="bf16")
    assert stored_in_float32(tmp_path / "changed", "bf16")
    got, start = snapshot(fit(tmp_path / "changed", 4)), zigma().state_dict()
    weights = [name for name in start if start[name].is_floating_point()]
    moved = sum((want[f"model/{n}"] - start[n]).double().pow(2).sum() for n in weights)
    apart = sum((want[f"model/{n}"] - got[f"model/{n}"]).double().pow(2).sum() for n in weights)
    assert 0 < apart < 0.1 * moved


def test_float16_may_be_left_on_resume_and_its_skipped_batches_stay_skipped(tmp_path):
    changed = fit(tmp_path / "changed", 2, mixed_precision="fp16")
    assert stored_in_float32(tmp_path / "changed", "fp16")
    again = fit(tmp_path / "changed", 4)
    assert again.data.loader.starts == [changed.counters.batches]
    assert (again.counters.step, again.counters.skipped) == (4, changed.counters.skipped)
    assert all(torch.isfinite(v).all() for v in snapshot(again).values())


def test_the_launcher_s_precision_is_taken_when_none_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert fit(tmp_path / "told", 1, mixed_precision=None).options.mixed_precision == "bf16"
    assert fit(tmp_path / "given", 1, mixed_precision="no").options.mixed_precision == "no"
