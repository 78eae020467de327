"""The published DPM-Solvers as stored cases tell their settings: by key, in prose, or by the script that it names."""

from tests.parity.harness import NUMBER, Fixture
from zigflow.samplers import DpmSolver

# Settings of the two published solvers where a script gives none, and words of the prose that stand for them; of two
# that fit, the first counts.
LATENT = {
    "order": 3,
    "skip_type": "time_uniform",
    "method": "fast",
    "solver_type": "dpm_solver",
    "eps": 1e-3,
    "T": 1.0,
}
CONTINUOUS = {**LATENT, "skip_type": "logSNR", "eps": 1e-4}
SCRIPTS = {
    "eval_ldm_discrete": LATENT,
    "eval_t2i": LATENT,
    "dpm_solver_pp": LATENT,
    "DPM-Solver++": LATENT,
    "dpm_solver_upsample_g": LATENT,
    "eval_ldm": CONTINUOUS,
    "dpm_solver_pytorch": CONTINUOUS,
}


def is_continuous(fixture: Fixture) -> bool:
    """Whether a case was sampled in the continuous time of the VP-SDE, not on a table of betas.

    Raises:
        AssertionError: the case does not say.
    """
    return fixture.setting("continuous", told={words: s is CONTINUOUS for words, s in SCRIPTS.items()})


def dpm_solver(form: str, steps: int, fixture: Fixture, continuous: bool = False) -> DpmSolver:
    """The published sampler of a case; that of continuous time has another plan under the name "fast"."""

    def told(name: str) -> dict:
        return {words: settings[name] for words, settings in SCRIPTS.items()}

    start = fixture.setting("T", rf"\bT ?= ?({NUMBER})", told=told("T"))
    end = fixture.setting("eps", told=told("eps"))
    variant = fixture.word("method", told=told("method"))
    variant = "fast_equal_spans" if continuous and variant == "fast" else variant
    return DpmSolver(
        form, variant, steps, int(fixture.setting("order", told=told("order"))),
        fixture.word("skip_type", told=told("skip_type")), fixture.word("solver_type", told=told("solver_type")),
        interval=(1 - start, 1 - end), lower_order_final=False, last_step=False,
    )  # fmt: skip
