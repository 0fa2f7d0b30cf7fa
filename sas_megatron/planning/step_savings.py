"""What the chunked loss, fewer device reads and reading ahead save in a step, and their costs. No torch.

    chunked loss     saves the probabilities [T, V/P] of a microbatch; costs the logits once more
    one device read  saves one read for each parameter and model chunk; costs nothing
    reading ahead    hides reads of samples; costs host memory for the batches that are ready

The letters are those of `costs.output_loss`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activation_spec import FLOAT32_BYTES
from sas_megatron.costs.output_loss import OutputLoss, count_probability_bytes, resolve_output_loss
from sas_megatron.costs.parameters import chunk_weights
from sas_megatron.planning.hardware_file import Hardware

# As `data.read_ahead.MICROBATCHES_AHEAD`, which needs torch; one more is in the thread.
MICROBATCHES_IN_MEMORY = 5
# Tokens, labels and positions as int64, the loss mask in float32.
BYTES_PER_TOKEN = 3 * 8 + FLOAT32_BYTES


@dataclass(frozen=True)
class StepSavings:
    """Savings and costs on one rank, per optimizer step.

    Attributes:
        output_loss: The implementation of the loss.
        logits_bytes: Bytes that the chunked loss does not save for the backward pass, on the last stage.
        logits_seconds: Seconds in which it computes the logits again, on the last stage.
        device_reads: Reads of device tensors.
        saved_device_reads: Further reads of Megatron-core 0.16.1 without TransformerEngine, on stage 0.
        saved_read_seconds: Launches of these alone; each read also waits until the device is idle.
        host_bytes: Memory of the batches that are read ahead, on the first and the last stage.
        hidden_read_seconds: Longest read of a sample that one thread hides behind the step.
    """

    output_loss: OutputLoss
    logits_bytes: int
    logits_seconds: float
    device_reads: int
    saved_device_reads: int
    saved_read_seconds: float
    host_bytes: int
    hidden_read_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain types."""
        return asdict(self)


def estimate_savings(
    config: RunConfig, *, hardware: Hardware, step_seconds: float, data_parallel: int
) -> StepSavings:
    """Estimate the savings of a run.

    Args:
        config: The run.
        hardware: Figures of the device.
        step_seconds: Estimated seconds of a step.
        data_parallel: Number of data-parallel replicas.
    """
    training, data, model = config.training, config.data, config.model
    num_microbatches = training.num_microbatches(data_parallel)
    num_chunks = config.parallel.virtual_pipeline
    num_tensors = sum(len(chunk_weights(config, stage=0, chunk=chunk)) for chunk in range(num_chunks))
    tokens = training.micro_batch_size * data.sequence_length // config.parallel.context
    # The norm is computed from all tensors at once, and read together with the loss.
    saved_reads = num_tensors + num_chunks
    flops = 2 * tokens * model.hidden_size * model.padded_vocab_size // config.parallel.tensor
    rate = hardware.matrix_rate(training.precision) * hardware.attainable.matrix
    mask_bytes = training.micro_batch_size * data.sequence_length**2 if data.reset_at_document_ends else 0
    return StepSavings(
        output_loss=resolve_output_loss(config),
        logits_bytes=count_probability_bytes(config),
        logits_seconds=num_microbatches * flops / rate,
        device_reads=1,
        saved_device_reads=saved_reads,
        saved_read_seconds=1e-6 * hardware.operation_microseconds * saved_reads,
        host_bytes=MICROBATCHES_IN_MEMORY * (BYTES_PER_TOKEN * tokens + mask_bytes),
        hidden_read_seconds=step_seconds * data_parallel / training.global_batch_size,
    )
