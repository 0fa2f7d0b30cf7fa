"""Ceilings of a small copy and product, where a test is not about their size."""

from __future__ import annotations

import pytest


def shrink_ceilings(patch: pytest.MonkeyPatch) -> None:
    """Measure ceilings with a copy of 1 MiB and a product of side 64."""
    from sas_megatron.benchmarks import ceilings

    patch.setattr(ceilings, "COPIED_BYTES", dict.fromkeys(ceilings.COPIED_BYTES, 2**20))
    patch.setattr(ceilings, "PRODUCT_SIDE", dict.fromkeys(ceilings.PRODUCT_SIDE, 64))
