"""AdamW's parameter groups, Megatron-core's optimizer, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import nn

from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import DTYPES


def is_simulation(name: str) -> bool:
    """Return whether a parameter, given by its name, belongs to a head or feature simulation."""
    return ".simulation." in name


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a bias or a norm's weight, to which weight decay is never applied."""
    return parameter.dim() == 1 or name.endswith("bias")


def parameter_group(name: str, parameter: nn.Parameter) -> str:
    """Return a parameter's group: `matrices`, `vectors`, `simulation matrices` or `simulation vectors`."""
    kind = "vectors" if is_vector(name, parameter) else "matrices"
    return f"simulation {kind}" if is_simulation(name) else kind


def group_overrides(config: RunConfig) -> dict[str, ParamGroupOverride]:
    """Return the groups that override the learning rate or weight decay of `matrices`."""
    settings = config.optimizer
    final = config.schedule.final_fraction
    simulation_rate = settings.learning_rate * settings.simulation_learning_rate_multiplier
    simulation = ParamGroupOverride(max_lr=simulation_rate, min_lr=simulation_rate * final)
    return {
        "vectors": ParamGroupOverride(wd_mult=0.0),
        "simulation matrices": ParamGroupOverride(
            **simulation, wd_mult=settings.simulation_weight_decay_multiplier
        ),
        "simulation vectors": ParamGroupOverride(**simulation, wd_mult=0.0),
    }


def describe_parameter_groups(config: RunConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups in the form of a torch optimizer, with the overrides that `build_schedule` reads."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(parameter_group(name, parameter), []).append(parameter)
    overrides = group_overrides(config)
    return [{"params": parameters, **overrides.get(group, {})} for group, parameters in members.items()]


def build_optimizer(config: RunConfig, model_chunks: list[Any]) -> Any:
    """Build Megatron-core's AdamW over the parameters of the chunks, in the groups of `parameter_group`.

    It is fused: one operation updates all parameters of a group, and the host reads nothing.
    """
    settings = config.optimizer
    overrides = group_overrides(config)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.learning_rate * config.schedule.final_fraction,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_gradient_norm,
            bf16=config.training.precision == "bfloat16",
            params_dtype=DTYPES[config.training.precision],
            use_distributed_optimizer=settings.distributed,
        ),
        model_chunks,
        config_overrides={_group_key(group): override for group, override in overrides.items()},
        use_gloo_process_groups=False,  # for checkpoints in Megatron-core's format
    )
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(chained.optimizer, torch.optim.Adam):  # otherwise TransformerEngine's or Apex's
            for group in chained.optimizer.param_groups:
                group["fused"] = True
    return optimizer


def _group_key(group: str) -> ParamKey:
    predicate = ParamWithNamePredicate(
        name=group, fn=lambda parameter, name: parameter_group(name, parameter) == group
    )
    return ParamKey(with_name_predicate=predicate)


def build_schedule(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Build the learning-rate schedule; `step(1)` before an optimizer step sets the rate of that step."""
    schedule, peak, steps = config.schedule, config.optimizer.learning_rate, config.training.num_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * schedule.final_fraction,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if schedule.kind == "warmup_stable_decay" else schedule.kind,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=schedule.decay_steps,
        lr_wsd_decay_style="linear" if schedule.kind == "warmup_stable_decay" else None,
    )
