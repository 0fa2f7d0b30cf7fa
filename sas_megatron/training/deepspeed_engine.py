"""Training by DeepSpeed's ZeRO, over Megatron-core's process groups and tensor-parallel layers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from sas_megatron.checkpoint.rank_layout import describe_layout, describe_layout_changes
from sas_megatron.checkpoint.restoring import Checkpoint
from sas_megatron.checkpoint.sharded_tensors import shard_parameter, shard_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.gradient_sums import sum_over
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.training.engine import Engine, ForwardStep, Reports
from sas_megatron.training.optimizer import build_schedule, describe_parameter_groups

# Its files within a checkpoint.
FOLDER = "deepspeed"


class ModelParallelUnit:
    """What DeepSpeed asks of Megatron's groups; it probes for more by name, and must not find it.

    Gradients are averaged over the context ranks too, which see other tokens with the same weights.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the model."""
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return group

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self.get_data_parallel_group().rank()

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.get_data_parallel_group().size()


class DeepSpeedEngine(Engine):
    """ZeRO stages 0 to 3 with tensor and context parallelism; AdamW from torch."""

    def __init__(self, config: RunConfig, pieces: list[Any]) -> None:
        self.config = config
        self.pieces = pieces
        (self.model,) = self.pieces
        self.groups = ModelParallelUnit()
        self.num_microbatches = config.training.num_microbatches(
            parallel_state.get_data_parallel_world_size()
        )
        deepspeed = _import_deepspeed()
        optimizer = torch.optim.AdamW(
            describe_parameter_groups(config, self.model),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
        )
        self._sum_sequence_parallel_gradients()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=deepspeed_settings(config, num_microbatches=self.num_microbatches),
            mpu=self.groups,
            dist_init_required=False,
        )
        self.schedule = build_schedule(config, self.optimizer)

    def _sum_sequence_parallel_gradients(self) -> None:
        """Adds up the gradients of norms, which each tensor rank has for its own tokens.

        Megatron-core's engine does this once a step (`finalize_model_grads`); DeepSpeed does not know
        of it, so it happens in the backward pass, as the simulation's weights do it for themselves.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        for parameter in self.model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(lambda gradient: sum_over(group, [gradient])[0])

    def accumulate(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """Forward and backward; the last backward pass reduces over the data ranks."""
        assert num_microbatches == self.num_microbatches, "a step's microbatches are fixed at the start"
        step_batches = list(batches)
        tokens = torch.stack([batch["loss_mask"].sum() for batch in step_batches]).sum()
        dist.all_reduce(tokens, group=self.groups.get_data_parallel_group())
        # DeepSpeed means over microbatches and data ranks; the loss is a mean over tokens.
        scale = num_microbatches * self.groups.get_data_parallel_world_size() / tokens
        reports = []
        remaining = iter(step_batches)
        for microbatch in range(num_microbatches):
            losses, total_loss = forward_step(remaining, self.engine)
            total, _, report = total_loss(losses)
            self.engine.backward(total * scale)
            reports.append(report)
            if microbatch < num_microbatches - 1:
                self.engine.step()  # only counts
        return reports

    def measure_gradients(self) -> float:
        """By DeepSpeed, each parameter counted once; infinite where a gradient is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        stage = self.config.deepspeed.zero_stage
        if stage == 0:  # where it clips but tells no norm
            return self._gradient_norm()
        if stage == 3:
            return float(combine_grad_norm_groups(self.optimizer._get_norm_groups()))
        return float(self.optimizer.scaled_global_norm())

    def update(self, gradient_norm: float) -> None:
        """One AdamW step after clipping; DeepSpeed measures the norm once more."""
        self.engine.step()

    def drop_gradients(self) -> None:
        """As DeepSpeed passes over a step in which something overflowed."""
        with _all_overflows(self.optimizer, stage=self.config.deepspeed.zero_stage):
            self.engine.step()

    def sync_parameters(self) -> None:
        """Nothing to do: `update` leaves nothing to the next step."""

    def _gradient_norm(self) -> float:
        group = self.groups.get_model_parallel_group()
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in self.model.parameters():
            if getattr(parameter, "tensor_model_parallel", False) or group.rank() == 0:
                squares += parameter.grad.double().square().sum().cpu()
        squares = squares.to(parameter.device)
        dist.all_reduce(squares, group=group)
        return squares.sqrt().item()

    @torch.no_grad()
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """One microbatch after another."""
        self.engine.eval()
        reports = []
        for _ in range(num_microbatches):
            losses, report_of = forward_step(batches, self.engine)
            reports.append(report_of(losses)[2])
        self.engine.train()
        return reports

    def shards(self) -> list[ShardedTensor]:
        """The weights, for other engines and layouts to begin with; `restore` reads its own files."""
        if self.config.deepspeed.zero_stage < 3:
            return shard_weights(self.pieces)
        from deepspeed import zero

        # Gathered one after another; of the data ranks, which then hold the same, the first keeps them.
        shards = []
        for name, parameter in self.model.named_parameters():
            with zero.GatheredParameters([parameter]):
                if self.groups.get_data_parallel_rank() == 0:
                    values = parameter.detach().to("cpu", copy=True)
                    shards += shard_parameter(self.model, name, parameter, values)
        return shards

    def counts(self) -> dict[str, int]:
        """None: DeepSpeed's files have them."""
        return {}

    def write_files(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint, in the folder `deepspeed`."""
        self.engine.save_checkpoint(str(folder), tag=FOLDER, save_latest=False)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Exact, on the layout that saved it. DeepSpeed unpickles its files: load only your own."""
        changes = describe_layout_changes(checkpoint.manifest.layout, describe_layout(self.config))
        if changes:
            raise FileProblem(
                checkpoint.path,
                f"holds DeepSpeed's files for another layout ({changes})",
                "go on with the layout that saved it, or begin another run from its weights by "
                "checkpoint.initial_weights",
            )
        self.engine.load_checkpoint(str(checkpoint.path), tag=FOLDER, load_lr_scheduler_states=False)


@contextlib.contextmanager
def _all_overflows(optimizer: Any, *, stage: int) -> Iterator[None]:
    """Within it DeepSpeed's optimizer finds an overflow in any step; that of stage 0 does nothing.

    Seen in 0.19.8: where an overflow is found, its `step` clears gradients and buffers and updates nothing.
    """

    def find_overflow(*_args: Any, **_options: Any) -> None:
        optimizer.overflow = True

    replaced: dict[str, Any] = (
        {"step": lambda *_args, **_options: None}
        if stage == 0
        else {"_overflow_check_and_loss_scale_update": find_overflow}
        if stage == 3
        else {"check_overflow": find_overflow, "check_grad_overflow": True}
    )
    kept = {name: value for name, value in vars(optimizer).items() if name in replaced}
    vars(optimizer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)
        vars(optimizer).update(kept)


def deepspeed_settings(config: RunConfig, *, num_microbatches: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: what the run's sections decide, then `deepspeed.settings`."""
    settings = config.deepspeed.settings
    zero = {
        "stage": config.deepspeed.zero_stage,
        **settings.get("zero_optimization", {}),
    }
    return {
        # Torch's AdamW serves as well where states are offloaded.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **settings,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optimizer.clip_gradient_norm,
        "bf16": {"enabled": config.training.precision == "bfloat16"},
        "zero_optimization": zero,
    }


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed will not do without; only launchers set it.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # Its shared-memory collectives for CPU would be compiled now, with a compiler there may not be.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
