"""Training with DeepSpeed's ZeRO on Megatron-core's process groups and tensor-parallel layers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from typing_extensions import override

from sas_megatron.checkpoint.manifest import DAMAGE_REMEDY, MANIFEST, DamagedCheckpoint
from sas_megatron.checkpoint.rank_layout import describe_layout, describe_layout_changes
from sas_megatron.checkpoint.restoring import Checkpoint
from sas_megatron.checkpoint.sharded_tensors import shard_parameter, shard_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.gradient_sums import all_reduce_gradients
from sas_megatron.model.initialization import global_name
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.training.engine import Engine, ForwardStep, Reports, TrainedTensor, is_first_replica
from sas_megatron.training.optimizer import build_schedule, describe_parameter_groups

# Folder of DeepSpeed's files in a checkpoint.
FOLDER = "deepspeed"


class ModelParallelUnit:
    """The methods through which DeepSpeed asks for Megatron's process groups.

    DeepSpeed tests for other methods by name and changes its behaviour if they exist, so that only these are
    defined. The data-parallel group includes the context ranks, which process other tokens with the same
    weights: their gradients are averaged too.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of ranks that hold the same shard of the model."""
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's index in that group."""
        return self.get_data_parallel_group().rank()

    def get_data_parallel_world_size(self) -> int:
        """Return the size of that group."""
        return self.get_data_parallel_group().size()


class DeepSpeedEngine(Engine):
    """ZeRO stages 0 to 3 with tensor and context parallelism; AdamW from torch."""

    def __init__(self, config: RunConfig, model_chunks: list[Any]) -> None:
        self.config = config
        self.model_chunks = model_chunks
        (self.model,) = self.model_chunks
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
        # DeepSpeed has another optimizer for stage 1 in bfloat16: each rank has the full float32 gradients.
        self._keeps_full_gradients = type(self.optimizer).__name__ == "BF16_Optimizer"
        self.schedule = build_schedule(config, self.optimizer)

    def _sum_sequence_parallel_gradients(self) -> None:
        """Register hooks that sum the gradients of norms over the tensor ranks, in the backward pass.

        With sequence parallelism each tensor rank has the gradients of its own tokens. Megatron-core sums
        them once per step (`finalize_model_grads`), which DeepSpeed does not call. The weights of the
        simulation need no hook, because their layer sums their gradients.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        for parameter in self.model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(lambda gradient: all_reduce_gradients(group, [gradient])[0])

    @override
    def forward_backward(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """Run forward and backward; the last backward pass reduces the gradients over the data ranks."""
        assert num_microbatches == self.num_microbatches, "the number of microbatches of a step is fixed"
        step_batches = list(batches)
        tokens = torch.stack([batch["loss_mask"].sum() for batch in step_batches]).sum()
        dist.all_reduce(tokens, group=self.groups.get_data_parallel_group())
        # DeepSpeed averages over microbatches and data ranks, but the loss is a mean over tokens.
        scale = num_microbatches * self.groups.get_data_parallel_world_size() / tokens
        reports = []
        batch_iterator = iter(step_batches)
        for microbatch in range(num_microbatches):
            losses, total_loss = forward_step(batch_iterator, self.engine)
            total, _, report = total_loss(losses)
            self.engine.backward(total * scale)
            reports.append(report)
            if microbatch < num_microbatches - 1:
                self.engine.step()  # only counts the microbatch
        return reports

    @override
    def compute_gradient_norm(self) -> float:
        """Return DeepSpeed's norm, which counts each parameter once; infinite if a gradient is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        stage = self.config.deepspeed.zero_stage
        if stage == 0:  # clips, but does not return the norm
            return self._gradient_norm()
        if stage == 3:
            return float(combine_grad_norm_groups(self.optimizer._get_norm_groups()))
        if self._keeps_full_gradients:
            gradients, _ = self.optimizer.get_grads_for_norm()
            return float(combine_grad_norm_groups([get_global_norm_of_tensors(gradients, mpu=self.groups)]))
        return float(self.optimizer.scaled_global_norm())

    @override
    def update(self, gradient_norm: float) -> None:
        """Clip and update; DeepSpeed computes the norm again."""
        self.engine.step()

    @override
    def skip_update(self) -> None:
        """Let DeepSpeed skip the step as it skips one with an overflow."""
        stage = 0 if self._keeps_full_gradients else self.config.deepspeed.zero_stage
        with _forced_overflow(self.optimizer, stage=stage):
            self.engine.step()

    @override
    def trained_tensors(self) -> Iterator[TrainedTensor]:
        """Yield full parameters, which the data ranks gather one at a time at stages 1 to 3."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        for name, parameter in self.model.named_parameters():
            weights: Callable[[], torch.Tensor] = parameter.detach
            gradient = functools.partial(getattr, parameter, "grad")
            if self.config.deepspeed.zero_stage > 0:
                weights = functools.partial(safe_get_full_fp32_param, parameter)
                gradient = functools.partial(safe_get_full_grad, parameter)
            is_counted = is_first_replica(parameter, sharded_over_data=False)
            name = global_name(self.model, name)
            yield TrainedTensor(name, parameter, 0, weights, gradient, is_counted)

    @override
    def sync_parameters(self) -> None:
        """Do nothing: `update` defers nothing to the next forward pass."""

    def _gradient_norm(self) -> float:
        group = self.groups.get_model_parallel_group()
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in self.model.parameters():
            if getattr(parameter, "tensor_model_parallel", False) or group.rank() == 0:
                squares += parameter.grad.double().square().sum().cpu()
        squares = squares.to(parameter.device)
        dist.all_reduce(squares, group=group)
        return squares.sqrt().item()

    @override
    @torch.no_grad()
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """Run the microbatches one after another."""
        self.engine.eval()
        reports = []
        for _ in range(num_microbatches):
            losses, report_of = forward_step(batches, self.engine)
            reports.append(report_of(losses)[2])
        self.engine.train()
        return reports

    @override
    def shards(self) -> list[ShardedTensor]:
        """Return the weights, for other engines and layouts to start from; `restore` does not read them."""
        if self.config.deepspeed.zero_stage < 3:
            return shard_weights(self.model_chunks)
        from deepspeed import zero

        # Parameters are gathered one at a time, and the first data rank alone keeps a copy of each.
        shards = []
        for name, parameter in self.model.named_parameters():
            with zero.GatheredParameters([parameter]):
                if self.groups.get_data_parallel_rank() == 0:
                    values = parameter.detach().to("cpu", copy=True)
                    shards += shard_parameter(self.model, name, parameter, values)
        return shards

    @override
    def counts(self) -> dict[str, int]:
        """Return no counters: they are in DeepSpeed's files."""
        return {}

    @override
    def write_files(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint into the subfolder `deepspeed`."""
        self.engine.save_checkpoint(str(folder), tag=FOLDER, save_latest=False)

    @override
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load DeepSpeed's files, which only the layout that saved them can read.

        DeepSpeed unpickles these files, which can execute code: load only files that you trust.

        Raises:
            FileProblem: Another layout saved the checkpoint.
            DamagedCheckpoint: The folder has files for DeepSpeed that are not in the manifest.
        """
        changes = describe_layout_changes(checkpoint.manifest.layout, describe_layout(self.config))
        if changes:
            raise FileProblem(
                checkpoint.path,
                f"holds DeepSpeed's files for another layout ({changes})",
                "resume with the layout that saved it, or start another run from its weights with "
                "checkpoint.initial_weights",
            )
        unlisted = {
            str(path.relative_to(checkpoint.path)) for path in (checkpoint.path / FOLDER).rglob("*.pt")
        } - checkpoint.manifest.files.keys()
        if unlisted:  # DeepSpeed would read them, although they are not verified
            raise DamagedCheckpoint(
                checkpoint.path, f"is damaged: {min(unlisted)} is not in {MANIFEST}", DAMAGE_REMEDY
            )
        self.engine.load_checkpoint(str(checkpoint.path), tag=FOLDER, load_lr_scheduler_states=False)


@contextlib.contextmanager
def _forced_overflow(optimizer: Any, *, stage: int) -> Iterator[None]:
    """Make DeepSpeed's optimizer detect an overflow in every step; at stage 0, make its step do nothing.

    In DeepSpeed 0.19.8, `step` clears gradients and buffers and updates nothing if it detects an overflow.
    """

    def report_overflow(*_args: Any, **_options: Any) -> None:
        optimizer.overflow = True

    replaced: dict[str, Any] = (
        {"step": lambda *_args, **_options: None}
        if stage == 0
        else {"_overflow_check_and_loss_scale_update": report_overflow}
        if stage == 3
        else {"check_overflow": report_overflow, "check_grad_overflow": True}
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
    """Return DeepSpeed's configuration: `deepspeed.settings` and the fields of the run's sections.

    Gradients are accumulated and reduced in float32. By default, DeepSpeed uses the type of
    the weights.
    """
    settings = config.deepspeed.settings
    zero = {
        "stage": config.deepspeed.zero_stage,
        **settings.get("zero_optimization", {}),
    }
    return {
        # torch's AdamW also works with offloaded states.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **settings,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optimizer.clip_gradient_norm,
        "bf16": {"enabled": config.training.precision == "bfloat16"},
        "data_types": {**settings.get("data_types", {}), "grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed requires this variable, which only launchers set.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # Prevent the compilation of its shared-memory collectives for CPU: a compiler may be missing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
