"""Processes: how data and noise are joined, what the network predicts, and the loss."""

from .diffusion_forms import DIFFUSION_FORMS
from .flow import Flow
from .interpolants import INTERPOLANTS, Interpolant
from .process import PREDICTIONS, ModelFunction, Process, SdeProcess, predict
from .time_laws import TIME_LAWS

__all__ = [
    "DIFFUSION_FORMS",
    "INTERPOLANTS",
    "PREDICTIONS",
    "TIME_LAWS",
    "Flow",
    "Interpolant",
    "ModelFunction",
    "Process",
    "SdeProcess",
    "predict",
]
