"""Samplers: ODE and SDE solvers, chains, DPM-Solver, guidance, likelihood; they know processes, not models."""

from . import ode_adaptive, ode_fixed
from .chain import Bound, ChainSampler, variational_bound
from .dpm_solver import DpmSolver
from .guidance import Guided
from .likelihood import Likelihood
from .ode import OdeSampler
from .sde import SdeSampler
from .solver import SAMPLERS, SamplingError, Solution
from .upsampling import Upsampled

__all__ = [
    "SAMPLERS",
    "Bound",
    "ChainSampler",
    "DpmSolver",
    "Guided",
    "Likelihood",
    "OdeSampler",
    "SamplingError",
    "SdeSampler",
    "Solution",
    "Upsampled",
    "ode_adaptive",
    "ode_fixed",
    "variational_bound",
]
