"""Activation checkpointing policies: what a block keeps for its backward pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from zigflow.registry import unknown_name

CHECKPOINT_POLICIES = ("none", "block", "selective")

_TOKENWISE = ("add_norm_modulate", "gated_add")
# A product whose rows come out so many times wider than they went in, such as a mixer's step projection, takes little
# to do again and much to keep.
_WIDENING = 16
_MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "linear", "_scaled_dot_product")


def _keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep the scans, convolutions and matrix products; recompute what is cheap.

    Cheap are norms, gathers, activations and products that widen their rows a lot.
    """
    name = op.name() if hasattr(op, "name") else str(op)
    namespace, _, rest = name.partition("::")
    if namespace == "zigflow" and any(cheap in rest for cheap in _TOKENWISE):
        return CheckpointPolicy.PREFER_RECOMPUTE
    base = rest.split(".")[0]
    if base in ("mm", "addmm"):
        # The dtype of the result may follow the factors.
        left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
        if right.shape[-1] >= _WIDENING * left.shape[-1]:
            return CheckpointPolicy.PREFER_RECOMPUTE
    if namespace == "zigflow" or base.startswith(_MATRIX_PRODUCTS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(policy: str, function: Callable, *args):
    """Call ``function(*args)`` under a policy: none, block (recompute all), selective (keep kernels and products).

    Raises:
        UnknownNameError: the policy is not one of the three.
    """
    if policy not in CHECKPOINT_POLICIES:
        raise unknown_name("checkpoint policy", policy, list(CHECKPOINT_POLICIES))
    if policy == "none" or not torch.is_grad_enabled():
        return function(*args)
    if policy == "block":
        return checkpoint(function, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_expensive)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class CheckpointedBlock(nn.Module):
    """A block that computes its ``layer`` under its ``checkpoint_policy``.

    Inside of what is compiled: code generated for a block may overwrite what a policy around it has kept.
    """

    checkpoint_policy = "none"
    layer: Callable

    def forward(self, *args):
        return checkpointed(self.checkpoint_policy, self.layer, *args)
