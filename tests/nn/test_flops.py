"""Operations are counted by formulas that are written down, and counting leaves the model alone."""

import pytest
import torch
from torch import nn

from dis_mamba import selective_scan
from model_zigma import ZigMa
from zigflow.nn.flops import count_flops, one_sample, scan_flops
from zigflow.tools.__main__ import main


class CountedTensor:
    """A scalar that counts the arithmetic it takes part in."""

    operations = 0

    def _step(self, other=None):
        CountedTensor.operations += 1
        return CountedTensor()

    __add__ = __radd__ = __mul__ = __rmul__ = exp = _step


def scan_by_hand(tokens, channels, states, skip, gate):
    """The recurrence of selective_scan's docstring, one scalar operation at a time."""
    CountedTensor.operations = 0
    for _ in range(channels):
        state = [CountedTensor() for _ in range(states)]
        for _ in range(tokens):
            u, dt, a, b, c, d, z = (CountedTensor() for _ in range(7))
            dtu = dt * u
            state = [(dt * a).exp() * h + dtu * b for h in state]
            y = CountedTensor()
            for h in state:
                y = y + c * h
            if skip:
                y = y + d * u
            if gate:
                y = y * z
    return CountedTensor.operations


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_the_scan_costs_what_its_definition_takes(skip, gate):
    assert scan_flops(1, 3, 2, 4, skip, gate) == scan_by_hand(3, 2, 4, skip, gate)
    assert scan_flops(5, 3, 2, 4, skip, gate) == 5 * scan_flops(1, 3, 2, 4, skip, gate)


def test_the_operator_is_counted_through_the_public_function():
    class Mixer(nn.Module):
        def forward(self, u, state):
            return selective_scan(u, u, state, *(u.new_empty(2, 7, 4) for _ in range(2)), z=u)

    count = count_flops(Mixer(), torch.empty(2, 7, 6, device="meta"), torch.empty(6, 4, device="meta"))
    assert count.forward == scan_flops(2, 7, 6, 4, False, True)


def small(depth=2, **changes):
    options = {
        "in_channels": 3, "embed_dim": 16, "depth": depth, "img_dim": 8, "patch_size": 2, "scan_type": "zigzagN8",
        "num_classes": 10, "class_dropout_prob": 0.1, **changes,
    }  # fmt: skip
    return ZigMa(**options)


def test_a_model_is_the_sum_of_its_layers():
    count = count_flops(small())
    tokens, dim, inner, states, rank, width = 16, 16, 32, 16, 1, 4
    patch = 2 * tokens * (3 * 4) * dim
    time = 2 * (256 * dim + dim * dim)
    block = (
        2 * tokens * dim * 2 * inner  # in_proj
        + tokens * inner * (2 * width + 1)  # convolution
        + 2 * tokens * inner * (rank + 2 * states)  # x_proj
        + 2 * tokens * rank * inner  # dt_proj
        + scan_flops(1, tokens, inner, states, True, True)
        + 2 * tokens * inner * dim  # out_proj
        + 2 * dim * 3 * dim  # modulation
    )
    assert count.modules["x_embedder"] == patch
    assert count.modules["t_embedder"] == time
    assert count.modules["blocks.0"] == count.modules["blocks.1"] == block
    assert count.modules["blocks"] == 2 * block, "a list of modules is never called itself"
    assert count.forward == sum(count.modules[m] for m in count.modules if "." not in m and m)
    assert count.forward == sum(count.operators.values()) == count.modules[""]
    assert count.training == 3 * count.forward
    assert count.macs == count.forward // 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": -1, "class_dropout_prob": 0},
        {"has_text": True, "d_context": 12, "n_context_token": 5, "num_classes": -1},
        {"video_frames": 3},
        {"scan_type": "v2"},
        {"scan_type": "parallelN3"},
    ],
    ids=str,
)
def test_every_kind_of_model_is_counted(options):
    shallow, deep = (count_flops(small(depth, **options)).forward for depth in (2, 4))
    deeper = count_flops(small(6, **options)).forward
    assert deeper - deep == deep - shallow > 0


def test_counting_changes_nothing():
    model = small()
    model.blocks[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    count_flops(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(generator, torch.get_rng_state())
    model(torch.rand(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 2])).sum().backward()


def test_a_model_that_does_not_say_what_it_reads():
    with pytest.raises(ValueError, match=r"Linear does not say what it reads: .*in_channels"):
        one_sample(nn.Linear(1, 1))
    assert count_flops(nn.Linear(3, 5), torch.empty(7, 3, device="meta")).forward == 2 * 7 * 3 * 5


def test_the_command_prints_the_table(capsys):
    assert main(["count-flops", "model.depth=2", "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "blocks" in out
    assert "training:" in out
    total = next(line for line in out.splitlines() if line.startswith("forward:"))
    assert main(["count-flops", "model.depth=4", "--depth", "1"]) == 0
    assert total not in capsys.readouterr().out
    assert main(["count-flops", "model=zigzag8_b"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_the_command_counts_all_frames_of_a_video_or_says_that_it_knows_none(capsys):
    def forward(*arguments):
        given = ["model=3d_zigzag8sst_b2", "model.embed_dim=16", "model.depth=2", "--depth", "1", *arguments]
        assert main(["count-flops", *given]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("forward:"))

    line = forward("data=ucf101")
    assert "FLOPs per sample of 16 frames" in line
    assert forward("data=none", "data.video_frames=16", "data.num_classes=101") == line
    assert main(["count-flops", "model=3d_zigzag8sst_b2", "data=none"]) == 1
    assert (
        "number of frames from the data, data=none has none: give data.video_frames=16"
        in capsys.readouterr().err
    )


def test_the_model_stays_as_it_is_whatever_it_shares():
    model = ZigMa(img_dim=8, patch_size=2, in_channels=1, embed_dim=16, depth=2, scan_type="parallelN3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
