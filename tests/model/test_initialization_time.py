"""A rank of a model of 6.7B parameters draws its weights in less than 25 seconds of processor time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sas_megatron.config.loading import load_run_config
from tests.conftest import ROOT

SECONDS = 25.0


def move_to_meta(model: Any) -> None:
    """Replace the parameters of a model by ones without storage, with the same shard attributes."""
    import torch

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            meta = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
            meta.__dict__.update(parameter.__dict__)
            module.register_parameter(name, meta)


def draw_on_rank(kind: str, tensor: int, rank: int) -> tuple[float, int]:
    """Return the processor seconds of one of `tensor` ranks, and its number of parameters."""
    from torch.utils._python_dispatch import _disable_current_modes

    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.initialization import initialize_weights
    from sas_megatron.planning.fake_world import fake_world

    config = load_run_config(ROOT / "configs" / "6.7b" / f"{kind}.yaml", [f"parallel.tensor={tensor}"])
    with fake_world(config.parallel, rank=rank, world_size=tensor):
        (model,) = build_gpt_chunks(config, draws_weights=False)
        with _disable_current_modes():
            move_to_meta(model)
            # Processor time, which does not depend on other load of this machine.
            start = time.process_time()
            initialize_weights(model, config)
            seconds = time.process_time() - start
    return seconds, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.exhaustive  # on a busy machine processor time grows as well
@pytest.mark.parametrize("kind", ["mha", "sas"])
def test_a_rank_of_eight_draws_its_shard_of_6_7b_in_25_seconds(separate_process: Any, kind: str) -> None:
    seconds, num_parameters = separate_process(draw_on_rank, kind, 8, 3)
    assert 6.6e9 < 8 * num_parameters < 7.0e9
    assert seconds < SECONDS
    print(f"{kind}: {seconds:.1f} s")
