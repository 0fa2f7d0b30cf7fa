"""Equal parameters: the MLP width at which a candidate's attention costs what the baseline's does."""

from __future__ import annotations

from collections.abc import Callable

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig

# Matrix widths in multiples of 8 fill the tensor cores' tiles in 16-bit precision (NVIDIA's
# "Matrix Multiplication Background" guide); each rank's share of the width should be one.
WIDTH_MULTIPLE = 8
# Two models within 2 % count as equally large here; a choice, printed wherever it is exceeded.
TOLERANCE = 0.02


def match_parameters(
    base: RunConfig,
    candidate: RunConfig,
    *,
    count_parameters: Callable[[RunConfig], int],
    tolerance: float = TOLERANCE,
) -> RunConfig:
    """`candidate` with the `model.ffn_hidden_size` that brings its parameters nearest to those of `base`.

    Parameters are affine in the width, so two counts give the line and the line gives the width.

    Args:
        base: the model to equal.
        candidate: any width; only that is changed, to a multiple of 8 × parallel.tensor.
        count_parameters: all parameters of a config's model.
        tolerance: largest difference, as a share of the parameters of `base`.

    Raises:
        UserError: no width comes within `tolerance`; says by how much and what would have to give.
    """
    step = WIDTH_MULTIPLE * candidate.parallel.tensor
    target = count_parameters(base)
    smallest = count_parameters(_with_width(candidate, step))
    per_step = count_parameters(_with_width(candidate, 2 * step)) - smallest
    if per_step <= 0:
        raise ValueError(f"count_parameters must grow with ffn_hidden_size; {step} more gave {per_step} more")
    without_mlp = smallest - per_step
    kind = candidate.attention.kind
    if without_mlp >= target:
        raise UserError(
            f"attention.kind={kind}: without any MLP the model has {without_mlp:,} parameters, the baseline "
            f"with its MLP {target:,}; give the variant fewer or narrower heads, or the baseline a larger "
            "model.ffn_hidden_size"
        )
    # Nearest multiple in whole numbers; the smaller of two that are equally near.
    below = (target - without_mlp) // per_step
    steps = max(1, min((below, below + 1), key=lambda count: abs(without_mlp + count * per_step - target)))
    matched = _with_width(candidate, steps * step)
    parameters = count_parameters(matched)
    if parameters != without_mlp + steps * per_step:
        raise ValueError(
            f"count_parameters must be affine in ffn_hidden_size; at {steps * step} it gave {parameters}, "
            f"the line through {step} and {2 * step} gives {without_mlp + steps * per_step}"
        )
    difference = abs(parameters - target) / target
    if difference > tolerance:
        raise UserError(
            f"attention.kind={kind}: the nearest model.ffn_hidden_size, {steps * step}, gives "
            f"{parameters:,} parameters against {target:,} of the baseline, {difference:.1%} apart where "
            f"{tolerance:.1%} is allowed (steps of {step} = {WIDTH_MULTIPLE} × parallel.tensor, "
            f"{per_step:,} parameters each); use a larger model, fewer tensor-parallel ranks, narrower "
            "heads, or a wider tolerance"
        )
    return matched


def _with_width(config: RunConfig, width: int) -> RunConfig:
    # Multiples of parallel.tensor satisfy the one rule that crosses sections here.
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": width})})
