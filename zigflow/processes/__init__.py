"""Processes: how data and noise are joined, what the network predicts, and the loss."""

from .diffusion import StableDiffusion, VariancePreserving
from .diffusion_forms import DIFFUSION_FORMS
from .flow import Flow
from .gaussian import Gaussian
from .interpolants import INTERPOLANTS, Interpolant, PathProcess, has_path
from .predictions import PREDICTIONS, Prediction, register_prediction
from .process import ModelFunction, Process, SdeProcess, predict, predict_with_variance
from .schedules import BETAS, SCHEDULES
from .time_laws import TIME_LAWS

__all__ = [
    "BETAS",
    "DIFFUSION_FORMS",
    "INTERPOLANTS",
    "PREDICTIONS",
    "SCHEDULES",
    "TIME_LAWS",
    "Flow",
    "Gaussian",
    "Interpolant",
    "ModelFunction",
    "PathProcess",
    "Prediction",
    "Process",
    "SdeProcess",
    "StableDiffusion",
    "VariancePreserving",
    "has_path",
    "predict",
    "predict_with_variance",
    "register_prediction",
]
