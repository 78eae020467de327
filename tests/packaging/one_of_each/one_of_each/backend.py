"""A kernel backend of the selective scan: ``model.ssm_cfg.backend=each_loop``."""

import torch
import torch.nn.functional as F

from dis_mamba import register_backend


class Loop:
    """One token after the other, without a gate or reversal of its own."""

    name = "each_loop"

    def unavailable(self):
        return None

    def accepts(self, call):
        return "it knows no reversed sequences" if call.reverse else None

    def run(self, call):
        step = call.delta if call.delta_bias is None else call.delta + call.delta_bias
        step = F.softplus(step) if call.delta_softplus else step
        state, outputs = call.u.new_zeros(call.u.shape[0], *call.A.shape), []
        for i in range(call.u.shape[1]):
            drive = (step[:, i] * call.u[:, i]).unsqueeze(-1) * call.B[:, i].unsqueeze(1)
            state = torch.exp(step[:, i].unsqueeze(-1) * call.A) * state + drive
            outputs.append((state * call.C[:, i].unsqueeze(1)).sum(-1))
        y = torch.stack(outputs, dim=1)
        y = y if call.D is None else y + call.D * call.u
        return y if call.z is None else y * F.silu(call.z)


register_backend(Loop(), before="reference")
