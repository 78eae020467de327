"""Three samplers: ``ode.sampling_method=each_ralston``, ``sde.sampling_method=each_late_noise`` and
``diffusion.sampling_method=each_ddim``."""

import torch

from zigflow.processes import predict
from zigflow.samplers import DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS, SdeStep
from zigflow.samplers.chain import chain_of
from zigflow.samplers.ode_fixed import FixedStep
from zigflow.samplers.solver import TimeRange, full_time

ODE_SOLVERS.register("each_ralston", FixedStep("each_ralston", 2, ((), (2 / 3,)), (1 / 4, 3 / 4)))


def _late_noise(drift, x, t, h, spread):
    return x + h * drift(x, full_time(t, x)) + spread


SDE_STEPS.register("each_late_noise", SdeStep("each_late_noise", 1.0, 1.0, 1, False, _late_noise))


@DIFFUSION_SAMPLERS.register("each_ddim")
class Ddim:
    """DDIM without noise, by the data that the model expects; takes ``diffusion.num_steps``."""

    def __init__(self, num_steps="50"):
        self.spacing = num_steps
        self.num_function_evaluations = 0

    def unfit(self, process):
        return (
            None
            if hasattr(process, "chain")
            else f"{type(process).__name__} has no chain: set process=gaussian"
        )

    def time_range(self, process):
        times = chain_of(process, self.spacing).times.tolist()
        return TimeRange(times[-1], times[0], "data")

    @torch.no_grad()
    def sample(self, process, model, x0, y=None, draws=None, callback=None):
        chain, x = chain_of(process, self.spacing), x0.float()
        self.num_function_evaluations = len(chain)
        for place in reversed(range(len(chain))):
            time = chain.times[place].expand(len(x)).to(x.device)
            output = predict(process, model, x, time, y)
            data, noise = process.data(output, x, time), process.noise(output, x, time)
            before = chain.alphas_bar_prev[place]
            x = (before.sqrt() * data + (1 - before).sqrt() * noise).float()
            if callback is not None:
                callback(
                    len(chain) - place, full_time(1.0 if place == 0 else float(chain.times[place - 1]), x), x
                )
        return x
