"""An interpolant: ``train.path_type=EachQuadratic``."""

from zigflow.processes import INTERPOLANTS
from zigflow.processes.interpolants import Interpolant


@INTERPOLANTS.register("EachQuadratic")
class Quadratic(Interpolant):
    """alpha = t (2 - t), sigma = 1 - t."""

    def alpha(self, t):
        return t * (2 - t)

    def sigma(self, t):
        return 1 - t
