"""An optimizer: ``optim.name=each_sign``."""

import torch

from zigflow.engine.optim import OPTIMIZERS, parameter_groups


class SignMomentum(torch.optim.Optimizer):
    """Steps of one size in the direction of an average gradient's signs."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.sub_(group["lr"] * state["average"].sign())


@OPTIMIZERS.register("each_sign")
def each_sign(model, *, lr=1e-4, momentum=0.9):
    return SignMomentum(parameter_groups(model, None), lr, momentum)
