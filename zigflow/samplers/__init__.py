"""Samplers: ODE and SDE solvers, chains, DPM-Solver, guidance, likelihood; they know processes, not models."""

from . import ode_adaptive, ode_fixed, torchdiffeq_adapter
from .chain import Bound, ChainSampler, variational_bound
from .dpm_grids import GRIDS, VARIANTS
from .dpm_solver import DpmSolver
from .guidance import Guided
from .likelihood import Likelihood
from .ode import OdeSampler
from .sde import SDE_STEPS, SdeSampler, SdeStep
from .solver import DIFFUSION_SAMPLERS, ODE_SOLVERS, OdeSolver, Sampler, SamplingError, Solution
from .upsampling import Upsampled

__all__ = [
    "DIFFUSION_SAMPLERS",
    "GRIDS",
    "ODE_SOLVERS",
    "SDE_STEPS",
    "VARIANTS",
    "Bound",
    "ChainSampler",
    "DpmSolver",
    "Guided",
    "Likelihood",
    "OdeSampler",
    "OdeSolver",
    "Sampler",
    "SamplingError",
    "SdeSampler",
    "SdeStep",
    "Solution",
    "Upsampled",
    "ode_adaptive",
    "ode_fixed",
    "torchdiffeq_adapter",
    "variational_bound",
]
