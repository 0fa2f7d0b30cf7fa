"""Options of Megatron-LM (`megatron/training/arguments.py`), for messages about unknown keys.

An option has a field of the same meaning (`MEGATRON_ALIASES`), a field in another unit (`OTHER_UNITS`), or
none (`NOT_OFFERED`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MEGATRON_ALIASES: dict[str, str] = {
    "num_attention_heads": "attention.num_heads",
    "num_query_groups": "attention.num_kv_heads",
    "kv_channels": "attention.head_dim",
    "attention_dropout": "attention.dropout",
    "attention_backend": "attention.backend",
    "qk_layernorm": "attention.qk_norm",
    "padded_vocab_size": "model.vocab_size",
    "make_vocab_size_divisible_by": "model.vocab_multiple",
    "init_method_std": "model.init_std",
    "norm_eps": "model.norm_epsilon",
    "layernorm_epsilon": "model.norm_epsilon",
    "add_bias_linear": "model.linear_bias",
    "add_qkv_bias": "attention.qkv_bias",
    "use_rope_scaling": "model.rotary_scaling",
    "rope_scaling_factor": "model.rotary_scaling_factor",
    "rotary_seq_len_interpolation_factor": "model.rotary_scaling_factor",
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.sequence",
    "context_parallel_size": "parallel.context",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "decoder_first_pipeline_num_layers": "parallel.first_stage_layers",
    "decoder_last_pipeline_num_layers": "parallel.last_stage_layers",
    "overlap_grad_reduce": "parallel.overlap_gradient_reduce",
    "overlap_param_gather": "parallel.overlap_parameter_gather",
    "recompute_granularity": "training.recompute",
    "recompute_num_layers": "training.recompute_layers",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "max_position_embeddings": "data.sequence_length",
    "data_path": "data.prefixes",
    "data_cache_path": "data.index_cache",
    "tokenizer_model": "data.tokenizer",
    "reset_position_ids": "data.reset_at_document_ends",
    "reset_attention_mask": "data.reset_at_document_ends",
    "lr": "optimizer.learning_rate",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_gradient_norm",
    "use_distributed_optimizer": "optimizer.distributed",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_wsd_decay_iters": "schedule.decay_steps",
    "train_iters": "training.num_steps",
    "exit_interval": "training.stop_after_steps",
    "distributed_timeout_minutes": "training.collective_timeout_minutes",
    "deterministic_mode": "training.deterministic",
    "eval_interval": "evaluation.interval",
    "save_interval": "checkpoint.interval",
    "async_save": "checkpoint.asynchronous",
    "log_interval": "logging.interval",
    "save": "logging.run_directory",
    "wandb_project": "logging.tracker_project",
}

# The value of a field by its dotted name; None if it is absent.
Lookup = Callable[[str], Any]


class OtherUnit(NamedTuple):
    """An option whose value means something else than that of our field.

    Attributes:
        field: The field.
        difference: How the two values differ.
        convert: Returns the value of the field for a value of the option, with the values of other fields.
            The result is None, or a TypeError or ZeroDivisionError is raised, if they do not determine it.
    """

    field: str
    difference: str
    convert: Callable[[Any, Lookup], Any]


def _samples(value: Any, get: Lookup) -> Any:
    return max(1, round(value / get("training.global_batch_size")))


def _chunks(value: Any, get: Lookup) -> Any:
    layers = get("model.num_layers") // (get("parallel.pipeline") or 1)
    return layers // value if layers % value == 0 else None


def _negate(value: Any, _get: Lookup) -> Any:
    return not value if isinstance(value, bool) else None


OTHER_UNITS: dict[str, OtherUnit] = {
    "eval_iters": OtherUnit(
        "evaluation.num_sequences",
        "counts iterations of a global batch, evaluation.num_sequences windows",
        lambda value, get: value * get("training.global_batch_size"),
    ),
    "min_lr": OtherUnit(
        "schedule.final_fraction",
        "is a learning rate, schedule.final_fraction a fraction of optimizer.learning_rate",
        lambda value, get: float(f"{value / get('optimizer.learning_rate'):.6g}"),
    ),
    "untie_embeddings_and_output_weights": OtherUnit(
        "model.tie_embeddings", "is the opposite of model.tie_embeddings", _negate
    ),
    "disable_bias_linear": OtherUnit("model.linear_bias", "is the opposite of model.linear_bias", _negate),
    "train_samples": OtherUnit(
        "training.num_steps", "counts samples, training.num_steps global batches", _samples
    ),
    "lr_warmup_samples": OtherUnit(
        "schedule.warmup_steps", "counts samples, schedule.warmup_steps global batches", _samples
    ),
    "lr_wsd_decay_samples": OtherUnit(
        "schedule.decay_steps", "counts samples, schedule.decay_steps global batches", _samples
    ),
    "lr_warmup_fraction": OtherUnit(
        "schedule.warmup_steps",
        "is a fraction of the run, schedule.warmup_steps a number of steps",
        lambda value, get: round(value * get("training.num_steps")),
    ),
    "rotary_percent": OtherUnit(
        "attention.rotary_dim",
        "is a fraction of a head, attention.rotary_dim a number of its features",
        lambda value, get: int(value * get("attention.head_dim")),
    ),
    "exit_duration_in_mins": OtherUnit(
        "training.stop_after_seconds",
        "counts minutes, training.stop_after_seconds seconds",
        lambda value, _get: value * 60,
    ),
    "num_layers_per_virtual_pipeline_stage": OtherUnit(
        "parallel.virtual_pipeline",
        "counts the layers of a model chunk, parallel.virtual_pipeline the chunks of a stage",
        _chunks,
    ),
    "position_embedding_type": OtherUnit(
        "attention.rotary",
        "names a kind of embedding, attention.rotary the place of rotary embeddings",
        lambda value, _get: {"rope": "after", "none": "none"}.get(value),
    ),
    "bf16": OtherUnit(
        "training.precision",
        "is a switch, training.precision a data type",
        lambda value, _get: {True: "bfloat16", False: "float32"}[value],
    ),
    "swiglu": OtherUnit(
        "model.activation",
        "is a switch, model.activation a name",
        lambda value, _get: {True: "swiglu", False: "gelu"}[value],
    ),
    "group_query_attention": OtherUnit(
        "attention.kind",
        "is a switch, attention.kind a name",
        lambda value, _get: {True: "gqa", False: "mha"}[value],
    ),
    "multi_latent_attention": OtherUnit(
        "attention.kind",
        "is a switch, attention.kind a name",
        lambda value, _get: {True: "mla", False: "mha"}[value],
    ),
}

_PRECISION = "training.precision is float32 or bfloat16"
_DENSE = "every layer has one dense MLP"
NOT_OFFERED: dict[str, str] = {
    **dict.fromkeys(("fp8", "fp8_format", "fp8_recipe", "fp4", "fp16", "initial_loss_scale"), _PRECISION),
    **dict.fromkeys(("loss_scale", "apply_query_key_layer_scaling"), _PRECISION),
    **dict.fromkeys(("num_experts", "moe_router_topk", "expert_model_parallel_size"), _DENSE),
    "no_rope_freq": "every layer has the same attention.rotary",
    "squared_relu": "model.activation is swiglu, gelu or gelu_tanh",
    "apply_layernorm_1p": "normalization weights start at 1, and are stored as they are",
    "rampup_batch_size": "training.global_batch_size is constant",
    "lr_decay_iters": "the learning rate decays until training.num_steps",
    "lr_decay_samples": "the learning rate decays until training.num_steps",
    "recompute_method": "recompute_layers counts the first layers of each stage",
    "use_torch_fsdp2": "training.engine=deepspeed with deepspeed.zero_stage=3 shards parameters",
    "use_custom_fsdp": "training.engine=deepspeed with deepspeed.zero_stage=3 shards parameters",
    "tp_comm_overlap": "the layers are those of Megatron-core without TransformerEngine's overlap",
    "transformer_impl": "the layers are the same with and without TransformerEngine",
    "use_flash_attn": "attention.backend selects the kernels",
    "cp_comm_type": "context ranks exchange tokens for heads (all-to-all)",
    "load": "checkpoint.resume=auto resumes the run in logging.run_directory, and checkpoint.initial_weights "
    "names weights",
    "finetune": "checkpoint.initial_weights names weights that a new run starts from",
    "wandb_exp_name": "the name of logging.run_directory is the name of the run",
    "tensorboard_dir": "events are written to tensorboard/ in logging.run_directory",
    "tokenizer_type": "the file that data.tokenizer names determines it",
    "vocab_file": "data.tokenizer names one file",
    "merge_file": "data.tokenizer names one file",
    "eod_mask_loss": "the end of a document is predicted as any other token",
    "num_workers": "each rank reads its own batches",
    "mock_data": "use the option --mock-data of `sas-megatron train`",
    "sgd_momentum": "the optimizer is AdamW",
    "decoupled_lr": "all matrices have optimizer.learning_rate",
    "start_weight_decay": "optimizer.weight_decay is constant",
    "accumulate_allreduce_grads_in_fp32": "gradients are always float32",
}


def describe_flag(flag: str, value: Any, tree: Mapping[str, Any]) -> str | None:
    """Return what to write instead of an option of Megatron-LM; None if `flag` is not one.

    Args:
        flag: The option with underscores.
        value: Its value.
        tree: The sections of the config, for conversions.
    """
    if flag in MEGATRON_ALIASES:
        return f"did you mean {MEGATRON_ALIASES[flag]}?"
    if flag in NOT_OFFERED:
        return f"{flag} is not offered: {NOT_OFFERED[flag]}"
    if flag not in OTHER_UNITS:
        return None
    other = OTHER_UNITS[flag]

    def get(field: str) -> Any:
        section, _, name = field.partition(".")
        fields = tree.get(section)
        return fields.get(name) if isinstance(fields, dict) else None

    try:
        converted = other.convert(value, get)
    except (TypeError, ZeroDivisionError, KeyError, OverflowError, ValueError):
        converted = None
    text = str(converted).lower() if isinstance(converted, bool) else converted
    use = other.field if text is None else f"{other.field}={text}"
    return f"{flag} {other.difference}; use {use}"
