"""Measure the ceilings with a small copy and product, for tests that do not concern their size."""

from __future__ import annotations

import pytest


def shrink_ceilings(patch: pytest.MonkeyPatch) -> None:
    """Measure ceilings with a copy of 1 MiB and a product of side 64."""
    from sas_megatron.benchmarks import roofline

    patch.setattr(roofline, "COPIED_BYTES", dict.fromkeys(roofline.COPIED_BYTES, 2**20))
    patch.setattr(roofline, "PRODUCT_SIDE", dict.fromkeys(roofline.PRODUCT_SIDE, 64))
