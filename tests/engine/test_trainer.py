"""The loop: its order, its arithmetic, and that a run may be cut."""

import itertools
import json
import logging

import pytest
import torch

from tests.assertions import assert_close
from tests.engine.test_checkpoint import assert_nothing_pickled
from tests.engine.toys import CLASSES, Loader, TinyModel, ToyProcess, assert_same_bits, make_trainer, snapshot
from zigflow import files
from zigflow.engine import checkpoint
from zigflow.engine import step as step_module
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.ema import EmaProfile
from zigflow.engine.log import read_metrics
from zigflow.engine.monitor import MACHINE_KEYS
from zigflow.engine.optim import Schedule
from zigflow.engine.precision import LossScaler, TooManyOverflowsError
from zigflow.engine.run_dir import RunDir, RunDirError
from zigflow.engine.run_state import load_weights
from zigflow.engine.step import NonFiniteError


def test_one_step_is_accumulate_unscale_clip_step_average(tmp_path, monkeypatch):
    calls = []
    trainer = make_trainer(
        tmp_path, steps=1, grad_accum=2, hooks=[lambda t, r: calls.append(f"hook {t.counters.step}")]
    )

    def spy(owner, name, label):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(label)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spy(trainer.process, "loss", "loss")
    spy(torch.Tensor, "backward", "backward")
    spy(trainer.scaler, "unscale", "unscale")
    spy(step_module, "gradient_norm", "norm")
    spy(step_module, "clip_gradients", "clip")
    spy(trainer.optimizer, "step", "step")
    spy(trainer.ema, "update", "ema")
    trainer.fit()
    assert calls == [
        "loss",
        "backward",
        "loss",
        "backward",
        "unscale",
        "norm",
        "clip",
        "step",
        "ema",
        "hook 1",
    ]


def test_clipping_changes_the_step_that_is_taken(tmp_path):
    limit = 1e-3
    norms = []

    def after_clipping(trainer, record):
        clipped = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        norms.append((record.grad_norm, clipped.norm().item()))

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    start = TinyModel()
    trainer = make_trainer(
        tmp_path, steps=1, max_grad_norm=limit, hooks=[after_clipping], optimizer=sgd, accelerator=None
    )
    trainer.fit()
    (before, clipped), moved = norms[0], []
    for a, b in zip(start.parameters(), trainer.model.parameters(), strict=True):
        moved.append((a - b).flatten())
    assert before > 100 * limit
    assert abs(clipped - limit) < 1e-2 * limit
    assert abs(torch.cat(moved).norm().item() - limit) < 1e-2 * limit


def test_two_half_batches_equal_one_batch(tmp_path):
    whole = make_trainer(tmp_path / "1", model=TinyModel(dropout=0.0), batch_size=8)
    halves = make_trainer(tmp_path / "2", model=TinyModel(dropout=0.0), batch_size=4, grad_accum=2)
    whole.fit()
    halves.fit()
    assert whole.counters.images_seen == halves.counters.images_seen == 48
    a, b = snapshot(whole), snapshot(halves)
    for name in a:
        if name.startswith(("model/", "ema")) and "calls" not in name:
            assert_close(name, b[name], a[name])


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, cut, accumulate):
    loader = Loader(4, accumulate)
    straight = make_trainer(tmp_path / "a", steps=9, grad_accum=accumulate, loader=loader)
    straight.fit()
    unbroken = snapshot(straight)

    first = make_trainer(tmp_path / "b", steps=cut, grad_accum=accumulate)
    first.fit()
    del first
    torch.manual_seed(12345)
    again = Loader(4, accumulate)
    second = make_trainer(
        tmp_path / "b", steps=9, grad_accum=accumulate, model=TinyModel(seed=99), loader=again
    )
    second.fit()
    assert again.starts == [cut]
    assert again.given == loader.given[cut * accumulate :]
    assert_same_bits(snapshot(second), unbroken)
    assert second.counters == straight.counters

    def without_clock(path):
        return [
            {k: v for k, v in line.items() if k not in MACHINE_KEYS}
            for line in read_metrics(path / "metrics.jsonl")
        ]

    # Each part logs its own first step and multiples; the losses of shared lines are the same to the bit.
    lines = {line["step"]: line for line in without_clock(tmp_path / "b")}
    for line in without_clock(tmp_path / "a"):
        assert lines[line["step"]] == line


def test_a_run_killed_between_saves_repeats_the_steps_since_the_last(tmp_path):
    straight = make_trainer(tmp_path / "a", steps=8)
    straight.fit()

    class Killed(BaseException):
        pass

    def kill(trainer, record):
        if record.step == 7:
            raise Killed

    with pytest.raises(Killed):
        make_trainer(tmp_path / "b", steps=8, ckpt_every=3, log_every=1, hooks=[kill]).fit()
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]["step"] == 7
    again = make_trainer(tmp_path / "b", steps=8, ckpt_every=3, log_every=1)
    again.fit()
    assert again.data.loader.starts == [6]
    assert_same_bits(snapshot(again), snapshot(straight) | {"generator": torch.get_rng_state()})
    steps = [line["step"] for line in read_metrics(tmp_path / "b" / "metrics.jsonl")]
    assert steps == list(range(1, 9)), "lines past the checkpoint are dropped and written again"


def test_a_torn_line_is_dropped_on_resume(tmp_path):
    make_trainer(tmp_path, steps=2).fit()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    make_trainer(tmp_path, steps=4).fit()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_finished_run_is_left_alone(tmp_path):
    make_trainer(tmp_path, steps=3).fit()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*"))
    again = make_trainer(tmp_path, steps=3)
    again.fit()
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").rglob("*")) == before


def test_what_a_checkpoint_holds(tmp_path):
    trainer = make_trainer(
        tmp_path, steps=3, config={"model": {"width": 8}}, epoch_size=10, plugins=["peano"], keep_last=2
    )
    trainer.fit()
    assert_nothing_pickled(tmp_path)
    found = checkpoint.open_checkpoint(tmp_path)
    assert {p.name for p in found.path.iterdir()} == {
        "SEAL.json", "config.json", "trainer.json", "model.safetensors", "optimizer.safetensors",
        "ema_short.safetensors", "ema_official.safetensors", "rank_0000.safetensors", "rank_0000.json",
    }  # fmt: skip
    assert found.config == {"model": {"width": 8}}
    assert found.trainer["counters"]["step"] == 3
    assert found.trainer["counters"]["images_seen"] == 12
    assert found.trainer["data"] == {
        "seed": 0, "global_batch": 4, "epoch_size": 10, "identity": None, "g": 12, "epoch": 1,
    }  # fmt: skip
    assert found.trainer["run_id"] == RunDir(tmp_path).run_id
    assert found.trainer["plugins"] == ["peano"]
    assert {"torch", "numpy", "zigflow", "python"} <= set(found.trainer["versions"])
    keys = itertools.chain(*(found.tensors(p.stem) for p in found.path.glob("*.safetensors")))
    assert not any("_orig_mod" in key or key.startswith("module.") for key in keys)


def test_compiled_and_plain_share_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "marked", True))
    compiled = make_trainer(tmp_path, steps=2, compile=True)
    assert all(block.marked for block in compiled.model.blocks)
    compiled.fit()
    plain = make_trainer(tmp_path, steps=3, compile=False)
    plain.fit()
    assert plain.counters.step == 3


def test_a_policy_that_the_model_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set_checkpoint_policy"):
        make_trainer(tmp_path, checkpoint_policy="block")


def test_ema_weights_load_into_a_fresh_model(tmp_path):
    trainer = make_trainer(tmp_path, steps=3)
    trainer.fit()
    found = checkpoint.open_checkpoint(tmp_path)
    for weights, loaded in ((None, "ema_short"), ("official", "ema_official"), ("model", "model")):
        model = TinyModel(seed=5)
        assert load_weights(model, found, weights) == loaded
        want = trainer.model.state_dict() if loaded == "model" else trainer.ema.state_dict(loaded[4:])
        state = model.state_dict()
        assert all(torch.equal(state[name], want[name]) for name in want)
    with pytest.raises(CheckpointError, match="model, short, official"):
        load_weights(TinyModel(), found, "longer")
    with pytest.raises(CheckpointError) as error:
        load_weights(TinyModel(width=9), found)
    message = str(error.value)
    assert "table.weight is (3, 8) there and (3, 9) in the model (7 more differ)" in message
    assert str(found.path) in message
    assert "build the model with" in message
    assert "\n" not in message
    deeper = TinyModel()
    deeper.blocks.append(torch.nn.Linear(8, 8))
    with pytest.raises(
        CheckpointError, match=r"blocks\.2\.weight is missing there and \(8, 8\) in the model"
    ):
        load_weights(deeper, found)
    with pytest.raises(CheckpointError, match=r"table\.weight is \(3, 8\) there"):
        make_trainer(tmp_path, steps=4, model=TinyModel(width=9)).fit()


class Scanned(TinyModel):
    def __init__(self, order, **kwargs):
        super().__init__(**kwargs)
        self.order = torch.tensor(order)

    def scan_state(self):
        return {"layers.0.order": self.order}


def test_scan_orders_travel_and_must_match(tmp_path):
    make_trainer(tmp_path, steps=1, model=Scanned([1, 0, 2])).fit()
    found = checkpoint.open_checkpoint(tmp_path)
    assert found.tensors("paths")["layers.0.order"].tolist() == [1, 0, 2]
    with pytest.raises(CheckpointError, match=r"layers\.0\.order"):
        load_weights(Scanned([0, 1, 2]), found)
    with pytest.raises(CheckpointError, match=r"layers\.0\.order"):
        make_trainer(tmp_path, steps=2, model=TinyModel()).fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_samples(tmp_path, value):
    trainer = make_trainer(tmp_path, steps=9, ckpt_every=2, process=ToyProcess({21: value, 22: value}))
    with pytest.raises(NonFiniteError, match="step 6: .* samples 21, 22"):
        trainer.fit()
    found = checkpoint.open_checkpoint(tmp_path)
    assert found.step == 4
    assert all(torch.isfinite(v).all() for v in found.tensors("model").values())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters()), "the step was not taken"


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    def spoil(trainer, record):
        if record.step == 3:
            trainer.model.leave.bias.register_hook(lambda g: g * float("nan"))

    trainer = make_trainer(tmp_path, steps=9, ckpt_every=1, hooks=[spoil])
    with pytest.raises(NonFiniteError, match="step 4: the gradient norm"):
        trainer.fit()
    assert checkpoint.open_checkpoint(tmp_path).step == 3


def test_a_save_on_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    def full_disk(operation, path):
        if operation == "write" and "step-0000004" in str(path):
            raise OSError(28, "No space left on device", str(path))

    with files.observed(full_disk), pytest.raises(OSError, match="No space left"):
        make_trainer(tmp_path, steps=9, ckpt_every=2).fit()
    again = make_trainer(tmp_path, steps=4)
    again.fit()
    assert again.data.loader.starts == [2]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_old_checkpoints_go_and_kept_ones_stay(tmp_path):
    trainer = make_trainer(tmp_path, steps=9, ckpt_every=2, keep_last=2)
    trainer.counters.keep.append(2)
    trainer.counters.best = {"metric": "fid", "value": 1.0, "step": 4}
    trainer.fit()
    assert [c.step for c in checkpoint.list_complete(tmp_path / "checkpoints")] == [2, 4, 8, 9]


def test_never_resuming_refuses_a_directory_in_use(tmp_path):
    make_trainer(tmp_path, steps=2, resume="never").fit()
    with pytest.raises(RunDirError, match="resume=never"):
        make_trainer(tmp_path, steps=3, resume="never").fit()


def test_another_model_in_the_same_directory_is_a_contradiction(tmp_path, caplog):
    config = {"model": {"depth": 2, "scan": "zigzag"}, "optim": {"lr": 1.0}}
    make_trainer(tmp_path, steps=1, config=config).fit()
    other = {"model": {"depth": 3, "scan": "zigzag"}, "optim": {"lr": 2.0}}
    with pytest.raises(RunDirError, match=r"model\.depth: the checkpoint has 2, the command says 3"):
        make_trainer(tmp_path, steps=2, config=other).fit()
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, steps=2, config=config | {"optim": {"lr": 2.0}}).fit()
    assert "optim.lr was 1.0" in caplog.text


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 1}, {"epoch_size": 11}])
def test_data_of_another_meaning_is_refused(tmp_path, change):
    make_trainer(tmp_path, steps=1, epoch_size=10).fit()
    with pytest.raises(CheckpointError, match="would come in another order"):
        make_trainer(tmp_path, steps=2, **({"epoch_size": 10} | change)).fit()


IDENTITY = {"fingerprint": "aaa", "order": {"seed": 0, "shuffle": True, "sizes": (3, 4)}}


@pytest.mark.parametrize(
    "now, named",
    [
        (IDENTITY | {"fingerprint": "bbb"}, "fingerprint was 'aaa', is 'bbb'"),
        (
            {"fingerprint": "aaa", "order": {"seed": 0, "shuffle": False, "sizes": (3, 4)}},
            r"order\.shuffle was True, is False",
        ),
        (None, r"fingerprint was 'aaa', is '\(absent\)'"),
    ],
)
def test_other_data_or_another_order_is_refused(tmp_path, now, named):
    make_trainer(tmp_path, steps=1, data_identity=IDENTITY).fit()
    with pytest.raises(CheckpointError, match=f"other data or in another order: .*{named}"):
        make_trainer(tmp_path, steps=2, data_identity=now).fit()


def test_the_same_data_in_a_moved_folder_and_a_checkpoint_without_identity_resume(tmp_path):
    config = {"data": {"root": "/old"}}
    make_trainer(tmp_path / "a", steps=1, data_identity=IDENTITY, config=config).fit()
    stored = checkpoint.open_checkpoint(tmp_path / "a").trainer["data"]["identity"]
    assert stored["order"] == {"seed": 0, "shuffle": True, "sizes": [3, 4]}
    moved = make_trainer(tmp_path / "a", steps=2, data_identity=IDENTITY, config={"data": {"root": "/new"}})
    assert moved.fit().step == 2
    make_trainer(tmp_path / "b", steps=1).fit()
    assert make_trainer(tmp_path / "b", steps=2, data_identity=IDENTITY).fit().step == 2
    assert checkpoint.open_checkpoint(tmp_path / "b").trainer["data"]["identity"]["fingerprint"] == "aaa"
    with pytest.raises(TypeError, match="JSON"):
        make_trainer(tmp_path / "c", data_identity={"fingerprint": object()})


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(tmp_path):
    make_trainer(tmp_path, steps=4, ckpt_every=2).fit()
    file = tmp_path / "checkpoints" / "step-0000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer(tmp_path, steps=6).fit()


def test_two_writers(tmp_path):
    with RunDir(tmp_path), pytest.raises(RunDirError, match=r"another process \(pid \d+"):
        make_trainer(tmp_path, steps=1).fit()
    make_trainer(tmp_path, steps=1).fit()


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="data ended after step 2"):
        make_trainer(tmp_path, steps=5, loader=Loader(4, stop=2)).fit()


def test_a_partial_batch_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="micro-batch of 3 samples"):
        make_trainer(tmp_path, steps=1, batch_size=4, loader=Loader(3)).fit()


def test_asked_to_stop_it_saves_and_returns(tmp_path):
    trainer = make_trainer(tmp_path, steps=9, hooks=[lambda t, r: t.request_stop() if r.step == 3 else None])
    assert trainer.fit().step == 3
    assert checkpoint.open_checkpoint(tmp_path).step == 3


def test_the_learning_rate_follows_the_schedule_across_a_resume(tmp_path):
    rates = []

    def note(trainer, record):
        rates.append(record.lr)

    schedule = Schedule("cosine", warmup=2, total=6)
    make_trainer(tmp_path, steps=4, schedule=schedule, hooks=[note], lr=0.5).fit()
    make_trainer(tmp_path, steps=6, schedule=schedule, hooks=[note], lr=0.5).fit()
    assert rates == [0.5 * schedule.factor(step, 4 * step, 4) for step in range(6)]


def test_bf16_runs_and_keeps_float32_weights_and_loss(tmp_path):
    seen = []

    class Watched(TinyModel):
        def forward(self, x, t, y=None, return_features=()):
            seen.append(self.enter(torch.cat([x.flatten(1), t[:, None]], 1)).dtype)
            return super().forward(x, t, y)

    trainer = make_trainer(tmp_path, steps=2, model=Watched(), mixed_precision="bf16")
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def fp16(tmp_path, steps, poison=(), **changes):
    process = ToyProcess(dict.fromkeys(poison, 1e36))
    trainer = make_trainer(
        tmp_path, steps=steps, mixed_precision="fp16", log_every=1, process=process, **changes
    )
    # A scale at which the toy's own gradients fit float16; those of the poisoned samples do not, while their
    # loss is finite.
    trainer.scaler.scale = 1024.0
    return trainer


def test_fp16_overflow_is_skipped_and_counted(tmp_path):
    averages, loader = [], Loader(4)
    trainer = fp16(tmp_path, 6, poison=[9], loader=loader)
    real = trainer.ema.update
    trainer.ema.update = lambda seen, batch: (averages.append(seen), real(seen, batch))
    trainer.fit()
    assert trainer.counters.step == 6
    assert trainer.counters.skipped == 1
    assert trainer.counters.images_seen == 24
    assert averages == [0, 4, 8, 12, 16, 20]
    assert len(loader.given) == 7
    assert trainer.scaler.scale == 512.0
    state = checkpoint.open_checkpoint(tmp_path).trainer
    assert state["scaler"]["scale"] == 512.0
    assert state["data"]["g"] == 28


def test_fp16_resumes_to_the_bit_across_a_skip(tmp_path):
    straight = fp16(tmp_path / "a", 6, poison=[9])
    straight.fit()
    unbroken = snapshot(straight)
    for cut in (2, 3):
        folder = tmp_path / f"b{cut}"
        fp16(folder, cut, poison=[9]).fit()
        second = fp16(folder, 6, poison=[9], model=TinyModel(seed=4))
        second.fit()
        assert_same_bits(snapshot(second), unbroken)
        assert second.counters == straight.counters
        assert second.scaler.state_dict() == straight.scaler.state_dict()


def test_too_many_overflows_stop(tmp_path):
    with pytest.raises(TooManyOverflowsError, match="3 fp16 gradient overflows in a row"):
        fp16(tmp_path, 6, poison=range(8, 100), max_skips=3).fit()


def test_scaled_gradients_equal_plain_ones(tmp_path):
    """A power of two changes no bit of a float32 gradient."""
    norms = {}
    for name, scaled in (("plain", False), ("scaled", True)):
        found = norms.setdefault(name, [])
        note = [lambda t, r, found=found: found.append((r.grad_norm, r.loss))]
        trainer = make_trainer(tmp_path / name, steps=3, hooks=note)
        trainer.scaler.enabled, trainer.scaler.scale = scaled, 65536.0 if scaled else 1.0
        trainer.fit()
    assert norms["plain"] == norms["scaled"]


def test_the_scale_grows_again():
    scaler = LossScaler(True, scale=4.0, growth_interval=2)
    decisions = [scaler.accepts(norm) for norm in (1.0, float("inf"), 1.0, 1.0, 1.0)]
    assert decisions == [True, False, True, True, True]
    assert scaler.scale == 4.0
    assert scaler.skips_in_a_row == 0


def test_labels_reach_the_model_and_the_process_sees_its_attributes(tmp_path):
    seen = {}

    class Curious(ToyProcess):
        def loss(self, model, x1, x0, t, y=None):
            seen.update(classes=model.num_classes, scale=model.time_scale, y=y, grad=x1.requires_grad)
            return super().loss(model, x1, x0, t, y)

    make_trainer(tmp_path, steps=1, process=Curious()).fit()
    assert seen["classes"] == CLASSES
    assert seen["scale"] == 1.0
    assert seen["y"].dtype == torch.int64


def test_logged_lines_have_what_a_chart_needs(tmp_path):
    make_trainer(tmp_path, steps=4, log_every=2).fit()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4]
    wanted = {
        "step", "images_seen", "loss", "loss_by_time", "grad_norm", "lr", "skipped", "images_per_second", "data_wait",
        "memory_gib",
    }  # fmt: skip
    assert all(set(line) == wanted for line in lines)
    assert all(0 <= line["data_wait"] <= 1 for line in lines)


def test_training_learns(tmp_path):
    losses = []
    make_trainer(
        tmp_path, steps=200, batch_size=16, model=TinyModel(width=32, dropout=0.0),
        hooks=[lambda t, r: losses.append(r.loss)],
    ).fit()  # fmt: skip
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_a_half_life_that_the_ramp_never_reaches_is_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_trainer(
            tmp_path,
            steps=2,
            ema=(EmaProfile("long", half_life=50, ramp=0.5), EmaProfile("short", half_life=4, ramp=0.5)),
        ).fit()
    told = [r.getMessage() for r in caplog.records if "half-life" in r.getMessage()]
    assert told == ["EMA profile long: half-life 4 images at the end, a share of 0.5 of those seen, not 50"]
