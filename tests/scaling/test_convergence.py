"""Steps saved until a run reaches the final loss of another."""

from __future__ import annotations

import dataclasses

import pytest

from sas_megatron.scaling.convergence import FALLING, find_first_step, find_saving, find_savings
from sas_megatron.scaling.outcomes import LossCurve

REFERENCE = LossCurve("mha", "s", "b", 3, "cosine", 100, 51.0, (25, 50, 75, 100), (5.0, 4.0, 3.5, 3.2))
FASTER = dataclasses.replace(REFERENCE, variant="sas", losses=(4.6, 3.4, 3.0, 2.9))


def test_saving_is_interpolated_between_evaluations() -> None:
    found = find_saving(REFERENCE, FASTER)
    assert found.steps == pytest.approx(62.5)
    assert found.saving == pytest.approx(0.375)
    assert found.reason is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"schedule": "constant"},
            "sas and mha have different schedules (constant and cosine), so that their steps "
            "are not comparable",
        ),
        (
            {"planned_steps": 200},
            "the schedules of sas and mha have 200 and 100 steps, so that their learning rates differ at the "
            "same step",
        ),
        ({"tokens_per_step": 102.0}, "the steps of sas and mha have 102 and 51 tokens"),
        (
            {"losses": (5.0, float("nan"), 3.0, 2.9)},
            "sas has missing losses or no evaluations",
        ),
        ({"losses": (), "steps": ()}, "sas has missing losses or no evaluations"),
        ({"losses": (5.0, 4.0, 3.6, 3.3)}, "sas does not reach 3.2000 in its 100 steps"),
    ],
)
def test_incomparable_pair_has_a_reason_instead_of_a_saving(changes: dict[str, object], reason: str) -> None:
    found = find_saving(REFERENCE, dataclasses.replace(FASTER, **changes))  # type: ignore[arg-type]
    assert (found.saving, found.steps, found.reason) == (None, None, reason)


def test_savings_are_averaged_over_shared_seeds() -> None:
    curves = [REFERENCE, FASTER]
    curves += [dataclasses.replace(curve, seed=4) for curve in (REFERENCE, FASTER)]
    curves[-1] = dataclasses.replace(curves[-1], losses=(4.6, 3.2, 3.0, 2.9))
    curves.append(dataclasses.replace(FASTER, seed=5))
    (found,) = find_savings(curves, reference="mha", candidate="sas")
    assert found.saving == pytest.approx((0.375 + 0.5) / 2)
    # Two seeds: 12.706 standard errors of 0.0625 on each side.
    assert found.interval == pytest.approx((0.4375 - 12.706 * 0.0625, 0.4375 + 12.706 * 0.0625), rel=1e-4)
    assert (found.reason, found.remarks) == (None, (FALLING,))


def test_mean_is_missing_if_a_seed_does_not_reach_the_loss() -> None:
    slow = dataclasses.replace(FASTER, seed=4, losses=(5.0, 4.5, 4.2, 4.1))
    curves = [REFERENCE, FASTER, dataclasses.replace(REFERENCE, seed=4), slow]
    (found,) = find_savings(curves, reference="mha", candidate="sas")
    assert (found.saving, found.interval) == (None, None)
    assert found.is_comparable
    assert found.reason == "sas does not reach 3.2000 in its 100 steps"


def test_constant_schedule_has_no_remark() -> None:
    curves = [dataclasses.replace(curve, schedule="constant") for curve in (REFERENCE, FASTER)]
    (found,) = find_savings(curves, reference="mha", candidate="sas")
    assert (found.saving, found.interval, found.remarks) == (pytest.approx(0.375), None, ())


def test_different_peak_learning_rates_are_remarked_on() -> None:
    curves = [dataclasses.replace(curve, learning_rate=0.004) for curve in (REFERENCE, FASTER)]
    (same,) = find_savings(curves, reference="mha", candidate="sas")
    assert same.remarks == (FALLING,)
    curves[1] = dataclasses.replace(curves[1], learning_rate=0.002)
    (found,) = find_savings(curves, reference="mha", candidate="sas")
    assert found.remarks == (FALLING, "The peak learning rate of sas is 0.5 times that of mha.")


def test_different_schedules_are_not_comparable() -> None:
    (found,) = find_savings(
        [REFERENCE, dataclasses.replace(FASTER, schedule="constant")], reference="mha", candidate="sas"
    )
    assert not found.is_comparable
    assert str(found.reason).startswith("sas and mha have different schedules")


def test_first_crossing_counts() -> None:
    curve = dataclasses.replace(REFERENCE, losses=(5.0, 3.0, 4.0, 2.0))
    assert find_first_step(curve, 4.0) == pytest.approx(37.5)
    assert find_first_step(curve, 5.0) == 25
    assert find_first_step(curve, 1.0) is None


def test_stopped_reference_has_no_final_loss() -> None:
    stopped = dataclasses.replace(REFERENCE, steps=REFERENCE.steps[:3], losses=REFERENCE.losses[:3])
    assert find_saving(stopped, FASTER).reason == "mha was evaluated up to step 75 of 100"
