"""Processes: how data and noise are joined, what the network predicts, and the loss."""

from .diffusion import StableDiffusion, VariancePreserving
from .diffusion_forms import DIFFUSION_FORMS
from .flow import Flow
from .gaussian import Gaussian
from .interpolants import INTERPOLANTS, Interpolant
from .process import PREDICTIONS, ModelFunction, Process, SdeProcess, predict, predict_with_variance
from .schedules import BETAS
from .time_laws import TIME_LAWS

__all__ = [
    "BETAS",
    "DIFFUSION_FORMS",
    "INTERPOLANTS",
    "PREDICTIONS",
    "TIME_LAWS",
    "Flow",
    "Gaussian",
    "Interpolant",
    "ModelFunction",
    "Process",
    "SdeProcess",
    "StableDiffusion",
    "VariancePreserving",
    "predict",
    "predict_with_variance",
]
