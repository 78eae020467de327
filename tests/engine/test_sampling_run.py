"""The same image for a seed, however the work is batched, split or cut."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.toys import CLASSES, SHAPE, EulerToy, TinyModel, ToyProcess, make_sampling_run
from zigflow.codec import IdentityCodec
from zigflow.engine.sampling_run import SamplingFolderError, weights_hash


def make_run(folder, *, num_samples=10, batch_size=4, **changes):
    settings = {
        "model": TinyModel(),
        "process": ToyProcess(),
        "sampler": EulerToy(),
        "codec": IdentityCodec(),
        "shape": SHAPE,
        "seed": 3,
        "num_classes": CLASSES,
        "progress": False,
        **changes,
    }
    settings |= {"num_samples": num_samples, "batch_size": batch_size}
    return make_sampling_run(folder=folder, **settings)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


class FakeRanks:
    """Rank r of n, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_main = rank, size, rank == 0

    def together(self, what):
        from contextlib import nullcontext

        return nullcontext()


def test_numbered_files_hold_what_is_returned(tmp_path):
    result = make_run(tmp_path).run()
    assert result.images.shape == (10, *SHAPE)
    assert result.images.dtype == np.uint8
    assert result.ids.tolist() == list(range(10))
    assert result.labels.tolist() == [i % CLASSES for i in range(10)]
    assert result.function_evaluations == 4
    assert sorted(files(tmp_path)) == [f"{i:06d}.png" for i in range(10)]
    for i in range(10):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{i:06d}.png")), result.images[i, 0])
    assert len({image.tobytes() for image in result.images}) == 10


def test_batches_are_always_full(tmp_path):
    sampler = EulerToy()
    make_run(tmp_path, sampler=sampler).run()
    assert sampler.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_more_samples_change_none_of_the_first(tmp_path):
    few = make_run(tmp_path / "a", num_samples=5).run().images
    many = make_run(tmp_path / "b", num_samples=11).run().images
    assert np.array_equal(few, many[:5])


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_samples_than_a_batch_are_those_of_a_larger_request(tmp_path, count):
    sampler = EulerToy()
    few = make_run(tmp_path, num_samples=count, sampler=sampler).run()
    assert sampler.batches == [[0, 1, 2, 3]], "computed in the batch that was given"
    assert len(files(tmp_path)) == count
    many = make_run(tmp_path, num_samples=11).run()
    assert many.images.shape == (11, *SHAPE)
    whole = make_run(tmp_path / "whole", num_samples=11).run().images
    assert np.array_equal(few.images, whole[:count])
    assert np.array_equal(many.images, whole)


def test_the_main_process_collects_what_all_have_computed(tmp_path):
    whole = make_run(tmp_path / "whole").run()
    main, other = (make_run(tmp_path / "split", ranks=FakeRanks(rank, 2)) for rank in range(2))
    own = main.run()
    assert own.ids.tolist() == [0, 1, 2, 3, 8, 9]
    with pytest.raises(SamplingFolderError, match=r"4 of 10 samples .*000004\.png; call run\(\)"):
        main.collect()
    other.run()
    result = main.collect()
    assert np.array_equal(result.images, whole.images)
    assert result.images.dtype == np.uint8
    assert result.ids.tolist() == list(range(10))
    assert result.labels.tolist() == whole.labels.tolist()
    assert result.identity == whole.identity
    assert result.function_evaluations == 4
    main.path(7).write_bytes(b"half a file")
    with pytest.raises(SamplingFolderError, match=r"1 of 10 samples .*000007\.png"):
        main.collect()


@pytest.mark.parametrize("shape", [(1, 2, 5), (3, 2, 5)])
def test_collected_colors_and_sides_stay_in_place(tmp_path, shape):
    class Noise(EulerToy):
        def sample(self, process, model, x0, y=None, draws=None):
            return x0.clamp(-1, 1)

    run = make_run(tmp_path, shape=shape, sampler=Noise())
    assert np.array_equal(run.run().images, run.collect().images)


@pytest.mark.parametrize("size", [2, 3])
def test_any_split_over_processes_gives_the_same_files(tmp_path, size):
    whole = make_run(tmp_path / "whole")
    whole.run()
    given = []
    for rank in range(size):
        given.append(make_run(tmp_path / "split", ranks=FakeRanks(rank, size)).run().ids)
    assert sorted(np.concatenate(given).tolist()) == list(range(10)), "each sample exactly once"
    assert files(tmp_path / "split") == files(tmp_path / "whole")


def test_another_batch_size_moves_a_grey_level_at_most(tmp_path):
    a = make_run(tmp_path / "a", batch_size=4).run().images.astype(int)
    for batch_size in (1, 3, 10):
        b = make_run(tmp_path / str(batch_size), batch_size=batch_size).run().images.astype(int)
        assert np.abs(a - b).max() <= 1


def test_another_seed_is_another_image(tmp_path):
    a, b = make_run(tmp_path / "a").run().images, make_run(tmp_path / "b", seed=4).run().images
    assert all(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cut_run_continues(tmp_path):
    make_run(tmp_path / "whole").run()
    run = make_run(tmp_path / "cut")
    run.run()
    for index in (1, 8):
        run.path(index).unlink()
    run.path(9).write_bytes(b"")
    (tmp_path / "cut" / ".000003.png.tmp").write_bytes(b"half")
    kept = run.path(5).stat().st_mtime_ns
    sampler = EulerToy()
    result = make_run(tmp_path / "cut", sampler=sampler).run()
    assert sampler.batches == [[0, 1, 2, 3], [8, 9, 10, 11]], "the complete batch is not computed again"
    assert run.path(5).stat().st_mtime_ns == kept
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert result.ids.tolist() == list(range(10))
    assert not list((tmp_path / "cut").glob(".*.tmp"))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"model": TinyModel(seed=8)}, "weights_sha256"),
        ({"identity": {"guidance": 2.0}}, "guidance"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, change, named):
    make_run(tmp_path).run()
    before = files(tmp_path)
    with pytest.raises(SamplingFolderError, match=f"{named}.*sample_dir="):
        make_run(tmp_path, **change).run()
    assert files(tmp_path) == before


def test_samples_without_an_identity_are_not_taken_over(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"someone else's")
    with pytest.raises(SamplingFolderError, match="another run"):
        make_run(tmp_path).run()


def test_errors_come_through(tmp_path):
    class Broken(EulerToy):
        def sample(self, *args, **kwargs):
            raise RuntimeError("the solver failed")

    with pytest.raises(RuntimeError, match="the solver failed"):
        make_run(tmp_path, sampler=Broken()).run()
    assert not files(tmp_path)


def test_samples_that_are_not_finite_are_errors(tmp_path):
    model = TinyModel()
    model.leave.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        make_run(tmp_path, model=model).run()


def test_latents_without_a_codec_are_refused(tmp_path):
    class Four(EulerToy):
        def sample(self, process, model, x0, y=None, draws=None):
            return x0

    with pytest.raises(SamplingFolderError, match="4 channels"):
        make_run(tmp_path, shape=(4, 2, 2), sampler=Four(), model=TinyModel()).run()


def test_video_frames_stand_side_by_side(tmp_path):
    class Still(EulerToy):
        def sample(self, process, model, x0, y=None, draws=None):
            return x0.clamp(-1, 1)

    result = make_run(tmp_path, shape=(5, 3, 2, 4), sampler=Still(), num_samples=2, batch_size=2).run()
    assert result.images.shape == (2, 3, 2, 20)
    assert Image.open(tmp_path / "000000.png").size == (20, 2)


def test_conditions_guidance_and_prior(tmp_path):
    seen = {}

    class Spy(EulerToy):
        def sample(self, process, model, x0, y=None, draws=None):
            seen.update(model=model, y=y, x0=x0)
            return x0.clamp(-1, 1)

    make_run(
        tmp_path / "a", sampler=Spy(), guide=lambda m: ("guided", m), label_of=lambda ids: ids * 0 + 2,
        process=SimpleNamespace(prior_scale=5.0),
    ).run()  # fmt: skip
    assert seen["model"][0] == "guided"
    assert seen["y"].tolist() == [2, 2, 2, 2]
    assert seen["x0"].std() > 3
    result = make_run(tmp_path / "b", sampler=Spy(), num_classes=0).run()
    assert seen["y"] is None
    assert result.labels is None
    asked = []

    def texts(ids):
        asked.append(len(ids))
        return torch.zeros(len(ids), 2, 3)

    assert make_run(tmp_path / "c", sampler=Spy(), label_of=texts).run().labels is None, "texts are no labels"
    assert max(asked) == 4, "the texts of all samples are never in memory together"


def test_the_identity_is_plain_json(tmp_path):
    run = make_run(tmp_path, identity={"sampler": "heun", "steps": (1, 2)})
    run.run()
    stored = json.loads((tmp_path / "sampling.json").read_text())
    assert stored["sampler"] == "heun"
    assert stored["weights_sha256"] == weights_hash(TinyModel())
    assert (
        make_run(tmp_path, identity={"sampler": "heun", "steps": (1, 2)}).run().function_evaluations is None
    )


def test_weights_hash_sees_every_weight():
    model = TinyModel()
    before = weights_hash(model)
    model.frozen.data[1] += 1
    assert weights_hash(model) != before


def test_dropout_is_off(tmp_path):
    a = make_run(tmp_path / "a", model=TinyModel(dropout=0.5).train()).run().images
    b = make_run(tmp_path / "b", model=TinyModel(dropout=0.0)).run().images
    assert np.array_equal(a, b)


def test_counts_are_checked(tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        make_run(tmp_path, batch_size=0)
    assert torch.is_grad_enabled()


def test_chosen_samples_are_those_of_the_whole_run(tmp_path):
    whole = make_run(tmp_path / "whole", num_samples=12).run()
    sampler = EulerToy()
    few = make_run(tmp_path / "few", ids=[7, 2, 11], batch_size=4, sampler=sampler).run()
    assert sampler.batches == [[7, 2, 11, 7]], "filled up by the chosen ones"
    assert few.ids.tolist() == [2, 7, 11]
    assert sorted(files(tmp_path / "few")) == ["000002.png", "000007.png", "000011.png"]
    assert np.abs(few.images.astype(int) - whole.images[[2, 7, 11]].astype(int)).max() <= 1
    assert few.labels.tolist() == [i % CLASSES for i in (2, 7, 11)]
    main, other = (
        make_run(tmp_path / "split", ids=[7, 2, 11], batch_size=2, ranks=FakeRanks(rank, 2))
        for rank in (0, 1)
    )
    assert sorted([*main.run().ids, *other.run().ids]) == [2, 7, 11]
    assert main.collect().ids.tolist() == [2, 7, 11]
    for wrong in ([1, 1], [-1], []):
        with pytest.raises(ValueError, match=r"ids must be different|at least 1"):
            make_run(tmp_path / "wrong", ids=wrong)


def test_images_need_not_be_held_in_memory(tmp_path):
    run = make_run(tmp_path)
    result = run.run(keep=False)
    assert result.images.size == 0
    assert result.ids.tolist() == list(range(10))
    assert result.labels.tolist() == run.class_labels().tolist()
    some, whole = run.collect(keep=3), run.collect()
    assert some.ids.tolist() == whole.ids.tolist()
    assert np.array_equal(some.images, whole.images[:3])
    assert np.array_equal(np.stack(list(run.images())), whole.images)
    run.path(9).unlink()
    with pytest.raises(SamplingFolderError, match=r"1 of 10 samples .*000009\.png"):
        run.collect(keep=3)
    with pytest.raises(SamplingFolderError, match=r"000009\.png"):
        list(run.images())


def test_a_folder_of_measurements_is_not_sampled_into(tmp_path):
    (tmp_path / "measuring.json").write_text("{}")
    with pytest.raises(SamplingFolderError, match=r"measuring\.json of a run of another kind; .*sample_dir="):
        make_run(tmp_path).run()
