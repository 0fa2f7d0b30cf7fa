"""Published losses of scaling studies, for comparison with the results that their authors published."""

from __future__ import annotations

import numpy as np

from sas_megatron.scaling.laws.points import Points

# Final C4 losses of the OLMo ladder (Bhagia et al. 2024, arXiv 2412.04403) by size, at 1, 2, 5 and 10 times
# 20 tokens per parameter; parameters from the configs of allenai/OLMo-ladder.
OLMO_LADDER = {
    190_354_176: (3.6010, 3.4965, 3.3905, 3.3367),
    371_262_464: (3.3943, 3.2879, 3.1880, 3.1326),
    758_220_288: (3.2020, 3.1043, 3.0045, 2.9549),
    1_279_395_840: (3.0631, 2.9712, 2.8785, 2.8323),
    3_169_537_280: (2.8743, 2.7880, 2.7057, 2.6644),
}


def olmo_ladder() -> Points:
    """Return the 20 runs of the OLMo ladder."""
    params = np.repeat(np.array(list(OLMO_LADDER), dtype=float), 4)
    tokens = 20 * params * np.tile([1, 2, 5, 10], len(OLMO_LADDER))
    return Points.of(params, tokens, [loss for losses in OLMO_LADDER.values() for loss in losses])
