"""Run a command of `sas-megatron` with a simulation whose gradients are not summed over the tensor ranks.

usage: python -m tests.preflight.broken_layer COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import sys

from sas_megatron.cli.main import main
from sas_megatron.platform.device import prepare_device

if __name__ == "__main__":
    prepare_device()
    from sas_megatron.attention.sas import layer

    layer.sum_gradients_over = lambda _group, weights: tuple(weights)  # type: ignore[assignment]
    sys.exit(main())
