"""Samplers: ODE and SDE solvers, guidance and likelihood; they know processes, not models."""

from . import ode_adaptive, ode_fixed
from .guidance import Guided
from .likelihood import Likelihood
from .ode import OdeSampler
from .sde import SdeSampler
from .solver import SAMPLERS, SamplingError, Solution

__all__ = [
    "SAMPLERS",
    "Guided",
    "Likelihood",
    "OdeSampler",
    "SamplingError",
    "SdeSampler",
    "Solution",
    "ode_adaptive",
    "ode_fixed",
]
