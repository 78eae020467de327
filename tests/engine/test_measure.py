"""Measurements of data: the same values however the work is batched over processes, cut or prolonged."""

from contextlib import nullcontext

import pytest
import torch

from tests.engine.toys import CLASSES, SHAPE, TinyModel, batch_at, split_run
from zigflow.codec import IdentityCodec
from zigflow.engine.measure import MeasuringRun
from zigflow.engine.sampling_run import SamplingFolderError
from zigflow.keyed import KeyedDraws
from zigflow.processes import Flow, Gaussian
from zigflow.samplers import ChainSampler, OdeSampler, variational_bound


class Source:
    """Samples of the toys, counted when read."""

    fingerprint = "toys"

    def __init__(self, size=10):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        batch = batch_at([index])
        return {"pixels": batch.pixels[0], "labels": int(batch.labels[0]), "key": str(index)}


class FakeRanks:
    def __init__(self, rank, size):
        self.rank, self.size, self.is_main = rank, size, rank == 0

    def together(self, what):
        return nullcontext()


def make_run(folder, *, num_samples=10, batch_size=4, **changes):
    settings = {
        "quantity": "bits_per_dim",
        "source": Source(),
        "codec": IdentityCodec(),
        "model": TinyModel(),
        "process": Flow(),
        "sampler": OdeSampler(method="heun", num_steps=4),
        "seed": 3,
        "level": 2 / 255,
        "progress": False,
        **changes,
    }
    settings |= {"num_samples": num_samples, "batch_size": batch_size}
    return MeasuringRun(*split_run(settings), folder=folder, **settings)


def measured(run):
    run.run()
    return run.collect()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "batches").glob("*"))}


@pytest.mark.parametrize("quantity, shape", [("bits_per_dim", ()), ("noise", SHAPE)])
def test_one_value_for_each_sample(tmp_path, quantity, shape):
    values, ids = measured(make_run(tmp_path, quantity=quantity))
    assert ids.tolist() == list(range(10))
    assert values.shape == (10, *shape)
    assert values.isfinite().all()
    assert values.flatten(1).unique(dim=0).shape[0] == 10 if shape else values.unique().numel() == 10


def test_the_bound_is_that_of_the_chain(tmp_path):
    """Value by value what ``variational_bound`` gives for the sample alone; more steps, another chain."""
    process = Gaussian()

    class Noise(TinyModel):
        def forward(self, x, t, y=None):
            return super().forward(x, t / 1000, y)

    model = Noise()
    sampler = ChainSampler("ddpm", 5, clip_denoised=True)
    given = {"process": process, "model": model, "sampler": sampler, "level": None}
    values, _ = measured(make_run(tmp_path / "five", quantity="bound", **given))
    assert values.shape == (10,) and (values > 0).all()
    batch = batch_at([7])
    alone = variational_bound(
        process,
        model,
        batch.pixels,
        batch.labels,
        KeyedDraws(3, torch.tensor([7])),
        spacing=5,
        clip_denoised=True,
    )
    assert abs(values[7] - alone.total[0].double()) < 1e-5 * values[7]
    other = {**given, "sampler": ChainSampler("ddpm", 9, clip_denoised=True)}
    assert (measured(make_run(tmp_path / "nine", quantity="bound", **other))[0] != values).any()
    with pytest.raises(ValueError, match="ddim has no variational bound"):
        ChainSampler("ddim", 5).bound(process, model, batch.pixels)


def test_noise_leads_back_to_the_data(tmp_path):
    source, sampler = Source(4), OdeSampler(method="rk4", num_steps=40)
    values, _ = measured(make_run(tmp_path, quantity="noise", source=source, sampler=sampler))
    data = torch.stack([source[i]["pixels"] for i in range(4)])
    labels = torch.tensor([source[i]["labels"] for i in range(4)])
    back = sampler.sample(Flow(), TinyModel().eval(), values, labels)
    assert (back - data).abs().max() < 1e-3
    assert int(labels.max()) < CLASSES


@pytest.mark.parametrize("quantity", ["bits_per_dim", "noise"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_split_over_processes_gives_the_same_files(tmp_path, quantity, size):
    measured(make_run(tmp_path / "whole", quantity=quantity))
    runs = [
        make_run(tmp_path / "split", quantity=quantity, ranks=FakeRanks(rank, size)) for rank in range(size)
    ]
    for run in runs[1:]:
        (tmp_path / "split" / "batches").mkdir(parents=True, exist_ok=True)
        run.run()
    (tmp_path / "split" / "measuring.json").write_bytes((tmp_path / "whole" / "measuring.json").read_bytes())
    runs[0].run()
    assert contents(tmp_path / "split") == contents(tmp_path / "whole")
    read = [index for run in runs for index in set(run.data.source.read)]
    assert sorted(set(read)) == list(range(10))


def test_fewer_samples_than_a_batch_are_those_of_a_larger_request(tmp_path):
    few, ids = measured(make_run(tmp_path / "a", num_samples=3))
    assert ids.tolist() == [0, 1, 2]
    source = Source()
    many, ids = measured(make_run(tmp_path / "a", num_samples=99, source=source))
    assert ids.tolist() == list(range(10)), "no more than there are"
    assert min(source.read[1:]) == 0 and 3 not in source.read[2:], "the first batch was there"
    whole, _ = measured(make_run(tmp_path / "b"))
    assert torch.equal(few, whole[:3])
    assert torch.equal(many, whole)


def test_a_cut_run_continues(tmp_path):
    measured(make_run(tmp_path / "whole"))
    run = make_run(tmp_path / "cut")
    run.run()
    run.path(1).write_bytes(b"half a file")
    (tmp_path / "cut" / "batches" / ".000002.safetensors.tmp").write_bytes(b"half")
    kept = run.path(2).stat().st_mtime_ns
    with pytest.raises(SamplingFolderError, match=r"000001\.safetensors is missing or damaged"):
        run.collect()
    source = Source()
    again = make_run(tmp_path / "cut", source=source)
    again.run()
    assert source.read == [4, 5, 6, 7], "only the damaged batch is measured again"
    assert run.path(2).stat().st_mtime_ns == kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 4}, "seed"),
        ({"quantity": "noise"}, "quantity"),
        ({"model": TinyModel(seed=8)}, "weights"),
        ({"source": Source(9)}, "available"),
        ({"level": None}, "level"),
        ({"identity": {"steps": 9}}, "steps"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, change, named):
    measured(make_run(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(SamplingFolderError, match=f"{named}.*sample_dir="):
        make_run(tmp_path, **change).run()
    assert contents(tmp_path) == before


def test_a_folder_of_samples_is_not_measured_into(tmp_path):
    (tmp_path / "sampling.json").write_text("{}")
    with pytest.raises(SamplingFolderError, match=r"sampling\.json of a run of another kind"):
        make_run(tmp_path).run()


def test_arguments(tmp_path):
    for change, words in (
        ({"quantity": "bits"}, "bits_per_dim, bound, noise, got 'bits'"), ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"), ({"source": Source(0)}, "no samples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make_run(tmp_path, **change)
