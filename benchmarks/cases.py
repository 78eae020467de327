"""One step of one model: what the benchmarks of whole steps time, compare and profile."""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peers import PEERS, PublishedMixer, build_peer, parameters
from step_profile import AVERAGES, LOSS
from torch.profiler import record_function

from model_zigma import ZigMa
from zigflow.engine.ema import EmaProfile, EmaProfiles
from zigflow.engine.optim import build_optimizer

SCAN_TYPE = "zigzagN8"
ARRANGEMENTS = ("ours", "published", "none")
# Relative root mean square of a difference from the eager model: (output, gradients).
LIMITS = {"no": (1e-4, 1e-3), "bf16": (2e-2, 1e-1)}


class Setting(NamedTuple):
    """A model and its input; ``side`` of the latents, 8 pixels each."""

    name: str
    width: int
    depth: int
    patch: int
    side: int
    batch: int

    @property
    def tokens(self):
        return (self.side // self.patch) ** 2


def _full():
    # As many tokens in every batch.
    rows = [("ZigMa-B/1", 1, 256)] + [("ZigMa-B/2", 2, pixels) for pixels in (256, 512, 1024, 2048)]
    for name, patch, pixels in rows:
        side = pixels // 8
        yield Setting(f"{name} {pixels} px", 768, 24, patch, side, 16 * 1024 // (side // patch) ** 2)


SIZES = {
    "tiny": [Setting("width 32, depth 2, 16 tokens", 32, 2, 1, 4, 2)],
    "small": [
        Setting(f"width 256, depth 4, {side**2} tokens", 256, 4, 1, side, max(1, 2048 // side**2))
        for side in (16, 32, 64, 128)
    ],
    "full": list(_full()),
}


class Difference(SystemExit):
    """Two arrangements that must agree do not, or the order makes no difference."""


class Case:
    """One arrangement in one mode under one checkpoint policy, with an optimizer and averages of its own."""

    def __init__(self, setting, arrangement, mode, policy, state, options):
        self.arrangement, self.mode, self.policy = arrangement, mode, policy
        self.setting, self.device, self.precision = setting, options.device, options.precision
        self.model = build(setting, arrangement, options.backend, options.device)
        if arrangement in ARRANGEMENTS:
            self.model.load_state_dict(state)
        self.model.set_checkpoint_policy(policy)
        if mode == "compiled":
            self.model.compile_blocks(**getattr(options, "compile_options", {}))
        self.optimizer = build_optimizer("adamw", self.model, lr=1e-5, weight_decay=0.0)
        self.averages = EmaProfiles(self.model, [EmaProfile("rate", rate=0.9999)])
        generator = torch.Generator().manual_seed(1)
        shape = (setting.batch, 4, setting.side, setting.side)
        self.x, self.target = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
        self.t = torch.rand(setting.batch, generator=generator).to(options.device)
        self.seen = 0
        self.seconds = {"train": [], **({"inference": []} if policy == "none" else {})}
        self.memory = {}

    def predict(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(self.x, self.t)

    def backward(self):
        """The prediction, and the gradients in place."""
        self.model.train()
        out = self.predict()
        with record_function(LOSS):
            loss = F.mse_loss(out.float(), self.target)
        loss.backward()
        return out.detach()

    def train(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with record_function(AVERAGES):
            self.averages.update(self.seen, self.setting.batch)
        self.seen += self.setting.batch

    def inference(self):
        self.model.eval()
        with torch.no_grad():
            self.predict()

    def values(self):
        """Output and gradients, to be compared; the weights stay."""
        out = self.backward()
        weights = dict(self.model.named_parameters())
        names = ("x_embedder.proj.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.A_log")
        found = {"output": out, **{f"gradient of {name}": weights[name].grad.clone() for name in names}}
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        with torch.no_grad():
            found["output in inference"] = self.predict()
        return found

    def state_bytes(self):
        """Of weights, moments and averages."""
        # The averages are as large as the float32 weights.
        tensors = 2 * [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def build(setting, arrangement, backend, device):
    options = {
        "in_channels": 4, "embed_dim": setting.width, "depth": setting.depth, "img_dim": setting.side,
        "patch_size": setting.patch, "drop_path_rate": 0.0, "ssm_cfg": {"backend": backend}, "device": device,
    }  # fmt: skip
    if arrangement in PEERS:
        wanted = parameters(build(setting, "none", backend, torch.device("meta")))
        return build_peer(
            arrangement, wanted, width=setting.width, patch=setting.patch, side=setting.side, backend=backend,
            device=device,
        )  # fmt: skip
    if arrangement != "published":
        return ZigMa(scan_type=SCAN_TYPE if arrangement == "ours" else "v1", **options)
    ordered = ZigMa(scan_type=SCAN_TYPE, **{**options, "device": "cpu", "embed_dim": 16})
    orders = iter([(w.order, w.undo) for w in ordered.orders.at(ordered.token_grid, torch.device("cpu"))])

    def mixer(*args, **given):
        order, inverse = (index.clone().to(device) for index in next(orders))
        return PublishedMixer(*args, order=order, inverse=inverse, **given)

    return ZigMa(scan_type="v1", mixer=mixer, **options)


def weights_of(setting, options):
    """Weights for all cases: what training starts at zero is drawn, or no block would do anything."""
    torch.manual_seed(0)
    state = build(setting, "ours", "auto", torch.device("cpu")).state_dict()
    for value in state.values():
        if value.is_floating_point() and not value.any():
            value.normal_(std=0.1)
    return {name: value.to(options.device) for name, value in state.items()}


def check(cases, precision):
    """Raise Difference unless every case computes what its eager peer does, and the order matters."""
    first = {c.arrangement: c for c in reversed(cases)}
    ours, plain = (first[name].values() for name in ("ours", "none"))
    for case in cases:
        want = plain if case.arrangement == "none" else ours
        for name, value in case.values().items():
            limit = LIMITS[precision]["gradient" in name]
            error = relative(value, want[name])
            if not error <= limit:
                raise Difference(
                    f"{case.setting.name}: {case.arrangement}, {case.mode}, checkpoint policy {case.policy}: "
                    f"the {name} differs by {error:.2e} of its size, {limit:.0e} allowed: not timed"
                )
    if relative(ours["output"], plain["output"]) < 10 * LIMITS[precision][0]:
        raise Difference(f"{cases[0].setting.name}: the output does not depend on the scan order: not timed")


def relative(value, want):
    value, want = value.double(), want.double()
    return float((value - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))


def turn(case, kind, steps):
    wait = torch.cuda.synchronize if case.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        getattr(case, kind)()
    wait()
    return (time.perf_counter() - started) / steps
