"""L(N, D) = E + A/N^α + B/D^β, and the optimal size and tokens for a compute budget.

Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3: the law is their equation 2, the fit equation 3, the
optimum equation 4. There C = 6 N D; here a token costs k N^p FLOPs, fitted to the FLOPs of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import HUBER_DELTA, FloatArray
from sas_megatron.scaling.laws.points import SMALLEST, Points
from sas_megatron.scaling.laws.resampling import Interval, draw_point_weights
from sas_megatron.scaling.laws.sum_of_powers import NEGLIGIBLE_SHARE, Fit, SumOfPowers

# Hoffmann et al. 2022 search exponents up to 2. Beyond 5, a term affects the smallest runs only.
LARGEST_EXPONENT = 5.0
# A law is determined if an F test rejects the best constant at this level; if at least half of the bootstrap
# draws contain five distinct runs, as from 8 runs on; if the intervals of its exponents are above 0 and end
# at most at the largest exponent of the search of Hoffmann et al. 2022; and if that of E does not end below
# this share of the lowest loss.
CONSTANT_SIGNIFICANCE = 1e-3
FEWEST_FOR_INTERVALS = 8
LARGEST_INTERVAL_END = 2.0
SMALLEST_IRREDUCIBLE = 1e-3

# Values by name, one per row of parameters.
Quantities = dict[str, FloatArray]


@dataclass(frozen=True)
class TokenCost:
    """Training FLOPs per token, k N^p, fitted to the `flops` of the points or assumed to be 6 N."""

    coefficient: float
    exponent: float
    source: Literal["flops", "6ND"]

    @staticmethod
    def of(points: Points) -> TokenCost:
        """Fit a line to log(FLOPs / tokens) over log N; return 6 N if no FLOPs are recorded.

        Raises:
            FieldError: The recorded FLOPs per token do not grow with the size.
        """
        if points.flops is None:
            return TokenCost(6.0, 1.0, "6ND")
        per_token = np.log(points.flops / points.tokens)
        slope, intercept = np.polyfit(np.log(points.params), per_token, 1)
        if slope <= 0:
            raise FieldError(
                "flops",
                f"proportional to tokens × params^{slope:.3g}",
                "the training FLOPs per token must grow with params",
                "correct the column, or remove it to assume 6ND",
            )
        with np.errstate(over="ignore"):
            return TokenCost(float(np.exp(intercept)), float(slope), "flops")


@dataclass(frozen=True)
class Optimum:
    """The optimal size and tokens for a budget of FLOPs, and their predicted loss."""

    flops: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossSurface:
    """The five parameters of the law, in the units of the points."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, params: FloatArray, tokens: FloatArray) -> FloatArray:
        """Return the predicted loss for parameters and tokens."""
        loss: FloatArray = self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta
        return loss

    def optimum(self, flops: float, cost: TokenCost) -> Optimum:
        """Solve α A N^-α = p β B D^-β with k N^p D = C; for p = 1, equation 4 of Hoffmann et al. 2022."""
        joint = self.alpha + cost.exponent * self.beta
        # In logarithms, which do not overflow; a result that does is infinite.
        with np.errstate(all="ignore"):
            balance = np.log(self.alpha / (cost.exponent * self.beta)) + np.log(self.A) - np.log(self.B)
            per_cost = np.log(flops) - np.log(cost.coefficient)
            log_params = (balance + self.beta * per_cost) / joint
            params, tokens = np.exp([log_params, per_cost - cost.exponent * log_params])
            loss = self.predict(params, tokens)
        return Optimum(flops, float(params), float(tokens), float(loss))


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted law, with the problem and parameters from which intervals are computed."""

    surface: LossSurface
    points: Points
    problem: SumOfPowers
    fit: Fit

    @property
    def log_residuals(self) -> FloatArray:
        """The log of the predicted minus the log of the measured loss of each point."""
        residuals: FloatArray = self.problem.problem.residuals(self.fit.theta[None])[0]
        return residuals

    def resample(self, *, num_draws: int, seed: int) -> FloatArray:
        """Return the parameters of the law of each bootstrap draw, (R, P).

        Raises:
            FieldError: There are too few draws for an interval, or fewer than two runs.
        """
        blocks = draw_point_weights(self.points, num_draws=num_draws, seed=seed)
        return np.concatenate([self.problem.refit(weights_RI, self.fit) for weights_RI in blocks])


def build_surface_problem(points: Points, *, delta: float = HUBER_DELTA) -> SumOfPowers:
    """Return the fitting problem of the law on these points."""
    return SumOfPowers.of([points.params, points.tokens], points.loss, delta=delta)


def fit_surface(points: Points, *, delta: float = HUBER_DELTA) -> SurfaceFit:
    """Fit the law by the sum of Huber losses of log residuals; an infinite `delta` gives least squares.

    Raises:
        FieldError: The points do not determine the law, or the loss does not decrease with N or with D.
    """
    points.check_surface()
    problem = build_surface_problem(points, delta=delta)
    fit = problem.fit()
    return _checked(points, problem, fit)


def project_surface(points: Points) -> SurfaceFit:
    """Fit the law by variable projection: least squares of relative residuals, non-negative coefficients.

    Raises:
        FieldError: As for `fit_surface`.
    """
    points.check_surface()
    problem = build_surface_problem(points, delta=np.inf)
    return _checked(points, problem, problem.fit_projected())


def surface_quantities(problem: SumOfPowers, theta_RP: FloatArray) -> Quantities:
    """Return E, A, B, alpha and beta of each row; a negligible E is 0."""
    E, A, B = problem.coefficients(theta_RP).T
    # The law is fitted to the logarithm of E, which is never that of zero.
    E = np.where(np.log(np.maximum(E, SMALLEST)) < problem.log_loss.min() + np.log(NEGLIGIBLE_SHARE), 0.0, E)
    alpha, beta = problem.exponents(theta_RP).T
    return {"E": E, "A": A, "B": B, "alpha": alpha, "beta": beta}


def optimal_exponents(quantities: Quantities, cost: TokenCost) -> Quantities:
    """Return the exponents of C in the optimal N, the optimal D and the loss above E.

    They are β/(α+pβ), α/(α+pβ) and αβ/(α+pβ) if a token costs k N^p.
    """
    alpha, beta = quantities["alpha"], quantities["beta"]
    joint = alpha + cost.exponent * beta
    return {
        "params_exponent": beta / joint,
        "tokens_exponent": alpha / joint,
        "loss_exponent": alpha * beta / joint,
    }


def check_determined(points: Points, intervals: Mapping[str, Interval]) -> None:
    """Check that there are enough runs for intervals, and that those of the exponents are narrow enough.

    Raises:
        FieldError: The points do not determine a law.
    """
    if points.num_runs < FEWEST_FOR_INTERVALS:
        raise _undetermined(
            points,
            f"of {points.num_runs} runs, most bootstrap draws contain fewer than the law has parameters",
            "sizes and token budgets",
        )
    if intervals["E"][1] < SMALLEST_IRREDUCIBLE * points.loss.min():
        raise _undetermined(
            points, "the 95 % interval of the irreducible loss E ends at zero", "sizes and token budgets"
        )
    for name, remedy in (("alpha", "sizes"), ("beta", "token budgets")):
        low, high = intervals[name]
        # NaN ends are not within the bounds either. The ends are printed with two digits, since those of an
        # undetermined exponent differ by a percent between processors.
        if not 0 < low <= high <= LARGEST_INTERVAL_END:
            raise _undetermined(
                points, f"the 95 % interval of the exponent {name} is {low:.2g} to {high:.2g}", remedy
            )


def _checked(points: Points, problem: SumOfPowers, fit: Fit) -> SurfaceFit:
    _check_explains(points, problem, fit)
    _check_falls(problem, fit)
    values = {name: float(value[0]) for name, value in surface_quantities(problem, fit.theta[None]).items()}
    return SurfaceFit(LossSurface(**values), points, problem, fit)


def _check_explains(points: Points, problem: SumOfPowers, fit: Fit) -> None:
    """Compare the law with the best constant by an F test of the sums of squares of log residuals."""
    unexplained = float((problem.problem.residuals(fit.theta[None]) ** 2).sum())
    total = len(points) * float(np.var(problem.log_loss))
    degrees = points.num_runs - len(fit.theta)
    added = len(fit.theta) - 1
    statistic = (total - unexplained) / added / max(unexplained / degrees, np.finfo(float).tiny)
    p_value = float(special.fdtrc(added, degrees, max(statistic, 0.0)))
    if p_value > CONSTANT_SIGNIFICANCE:
        raise _undetermined(
            points,
            f"a constant loss describes them nearly as well (F test, p = {p_value:.2g})",
            "sizes and tokens",
        )


def _undetermined(points: Points, reason: str, remedy: str) -> FieldError:
    return FieldError(
        "points",
        len(points),
        f"these points do not determine a law: {reason}",
        f"add runs, or {remedy} that differ more",
    )


def _check_falls(problem: SumOfPowers, fit: Fit) -> None:
    exponents_TI = problem.problem.forms @ fit.theta
    shares_TI = np.exp(exponents_TI - exponents_TI.max(axis=0))
    shares_TI /= shares_TI.sum(axis=0)
    for number, (name, remedy) in enumerate((("params", "sizes"), ("tokens", "token budgets"))):
        exponent = float(problem.exponents(fit.theta[None])[0, number])
        if exponent <= 0 or shares_TI[number + 1].max() < NEGLIGIBLE_SHARE:
            raise FieldError(
                "points",
                len(problem.log_loss),
                f"the loss does not decrease with {name}, so that the law does not apply",
                f"check for diverged runs, or add {remedy} that differ more",
            )
        if exponent > LARGEST_EXPONENT:
            raise FieldError(
                "points",
                len(problem.log_loss),
                f"the fitted exponent of {name} exceeds {LARGEST_EXPONENT:g}: the loss hardly depends on "
                f"{name} except at the smallest value",
                f"add {remedy} that differ more",
            )
