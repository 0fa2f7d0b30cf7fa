"""What the estimate says about the loss, device reads and reading ahead."""

from __future__ import annotations

import pytest

from sas_megatron.config.loading import load_run_config
from sas_megatron.planning.step_savings import MICROBATCHES_IN_MEMORY, estimate_savings
from tests.conftest import ROOT
from tests.planning.toy_machines import toy_machine


def test_the_savings_of_1_3b_are_those_of_its_sizes() -> None:
    """8,192 tokens of 2,048 features, 32,000 columns, 24 layers of six weights, one microbatch."""
    config = load_run_config(
        ROOT / "configs" / "1.3b" / "mha.yaml", ["parallel.tensor=1", "optimizer.distributed=false"]
    )
    samples, size = config.training.global_batch_size, config.training.micro_batch_size
    assert config.data.sequence_length * size == 8192
    hardware = toy_machine(device="gpu")
    savings = estimate_savings(config, hardware=hardware, step_seconds=3.0, data_parallel=samples // size)
    assert savings.output_loss == "chunked"
    assert savings.logits_bytes == 8192 * 32_000 * 4
    rate = hardware.matrix_rate("bfloat16") * hardware.attainable.matrix
    assert savings.logits_seconds == pytest.approx(2 * 8192 * 2048 * 32_000 / rate)
    assert (savings.device_reads, savings.saved_device_reads) == (1, 24 * 6 + 3 + 1)
    assert savings.saved_read_seconds == pytest.approx(148e-6 * hardware.operation_microseconds)
    assert savings.host_bytes == 5 * 8192 * 28
    assert savings.hidden_read_seconds == pytest.approx(3.0 / size)


def test_the_batches_in_memory_are_those_of_the_reader() -> None:
    from sas_megatron.data.read_ahead import MICROBATCHES_AHEAD

    assert MICROBATCHES_IN_MEMORY == MICROBATCHES_AHEAD + 1
