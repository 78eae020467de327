"""FID through torchmetrics, with a toy network in Inception's place."""

import pytest
import torch
from torch import nn

from zigflow.metrics.fid import Fid, check_weights
from zigflow.metrics.frechet import frechet_from_features


class ToyFeatures(nn.Module):
    num_features = 6

    def forward(self, images):
        x = images.double()
        rows, columns = x.mean((1, 3)), x.mean((1, 2))
        return torch.cat([rows[:, :3], columns[:, :3].square() / 100], dim=1)


def images(count, seed, shift=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count, 3, 4, 4), generator=generator).add(shift).to(torch.uint8)


@pytest.mark.slow
def test_the_number_is_ours_and_does_not_depend_on_the_split():
    real, fake, ids = images(50, 0), images(41, 1, 40), torch.arange(41)
    toy = ToyFeatures()
    whole = Fid(features=toy)
    with pytest.raises(RuntimeError, match="set_reference"):
        whole.update(fake, None, ids)
    whole.set_reference((real, None))
    whole.update(fake, None, ids)
    number = whole.compute()["fid"]
    assert number == pytest.approx(frechet_from_features(toy(fake), toy(real)), rel=1e-4)
    parts = [Fid(features=toy, batch_size=7) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.add_reference(real[rank::3])
    states = [part.reference_state() for part in parts]
    for rank, part in enumerate(parts):
        part.forget_reference()
        for state in states:
            part.absorb_reference(state)
        part.update(fake[rank::3], None, ids[rank::3])
    for part in parts[1:]:
        parts[0].absorb_state(part.state())
    assert parts[0].compute()["fid"] == pytest.approx(number, rel=1e-9)
    assert {k: v for k, v in parts[0].protocol().items() if k != "torchmetrics"} == {
        "metric": "fid", "n": 41, "ids_sha256": whole.protocol()["ids_sha256"], "features": "ToyFeatures",
        "inception_weights_sha256": None, "reference_split": "train", "reference_n": 50,
    }  # fmt: skip
    whole.reset()
    whole.update(real, None, torch.arange(50))
    assert whole.compute()["fid"] < 1e-6, "the reference stays when the samples are forgotten"


def test_missing_or_foreign_weights(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.inception_weights=PATH"):
        check_weights(None)
    with pytest.raises(FileNotFoundError, match="is no file"):
        check_weights(tmp_path / "none.pth")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    file = tmp_path / "evil.pth"
    torch.save({"w": Evil()}, file)
    with pytest.raises(ValueError, match="is no file of weights"):
        check_weights(file)
    assert not (tmp_path / "touched").exists()
    torch.save([1], file)
    with pytest.raises(ValueError, match="something else than tensors"):
        check_weights(file)
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match="is no file of weights"):
        check_weights(file)
    torch.save({"w": torch.ones(2)}, file)
    assert len(check_weights(file)) == 64
