"""Token files -> Megatron datasets -> the batches of one rank.

Samples have a fixed order, decided by seed, split, sequence length and the length of the run. Step
t takes the next `global_batch_size` of them; microbatch and data-parallel rank only decide who reads
which. The one piece of state is therefore how many samples were consumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.data.index_cache import provide_folder
from sas_megatron.data.token_files import load_manifest
from sas_megatron.data.tokenizer import Tokenizer

Sample = Mapping[str, torch.Tensor]

# Validation windows are the same for every seed, so that runs of several seeds compare.
VALIDATION_SEED = 0


def build_training_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int
) -> torch.utils.data.Dataset[Sample]:
    """At least `num_samples` samples of the training documents, in the order of `seed`."""
    return _build_samples(data, tokenizer, num_samples=num_samples, seed=seed, split=0)


def build_validation_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int
) -> torch.utils.data.Dataset[Sample]:
    """The fixed windows of the validation documents, equal for every seed and layout.

    Raises:
        FieldError: a file has fewer validation tokens than one window, which would hold the same text twice.
    """
    samples = _build_samples(data, tokenizer, num_samples=num_samples, seed=VALIDATION_SEED, split=1)
    for prefix, part in zip(data.prefixes, getattr(samples, "datasets", [samples]), strict=True):
        num_tokens = int(part.dataset.sequence_lengths[part.indices].sum())
        # A window reads S tokens and predicts S, the last of which it does not read.
        if num_tokens <= data.sequence_length:
            raise FieldError(
                "data.sequence_length",
                data.sequence_length,
                f"must be less than the {num_tokens} validation tokens of {prefix}, or a window would hold "
                "the same text twice",
                f"use at most {num_tokens - 1}, or raise the second share of data.split={data.split}",
            )
    return samples


def _build_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int, split: int
) -> torch.utils.data.Dataset[Sample]:
    """One split, by Megatron-core's builder, which finds its indices in the cache."""
    sizes = [1, 1, 0]
    sizes[split] = num_samples
    total = sum(data.split)

    def build(cache: Path, is_built_here: Callable[..., bool]) -> Any:
        return BlendedMegatronDatasetBuilder(
            GPTDataset,
            sizes,
            is_built_here,
            GPTDatasetConfig(
                random_seed=seed,
                sequence_length=data.sequence_length,
                blend=(data.prefixes, data.weights),
                split=",".join(f"{share / total:.9f}" for share in (*data.split, 0.0)),
                path_to_cache=str(cache),
                tokenizer=tokenizer,
                reset_position_ids=data.reset_at_document_ends,
                reset_attention_mask=data.reset_at_document_ends,
                eod_mask_loss=False,
                create_attention_mask=data.reset_at_document_ends,
            ),
        ).build()

    cache = index_folder(data, tokenizer, sizes=sizes, seed=seed)
    provide_folder(cache, lambda aside: build(aside, lambda *_place: dist.get_rank() == 0))
    samples = build(cache, lambda *_place: True)[split]
    if samples is None:
        raise FieldError(
            "data.split",
            data.split,
            f"leaves no {('training', 'validation')[split]} documents in {', '.join(data.prefixes)}",
            "raise that share, or prepare more documents",
        )
    built: torch.utils.data.Dataset[Sample] = samples
    return built


def index_folder(data: DataConfig, tokenizer: Tokenizer, *, sizes: list[int], seed: int) -> Path:
    """Where the indices of such samples are kept: a folder for all that decides them.

    By the contents of the token files, not by their names alone, as Megatron-core's cache would have it.
    """
    root = Path(data.index_cache) if data.index_cache else Path(data.prefixes[0]).parent / "index_cache"
    manifests = [load_manifest(prefix) for prefix in data.prefixes]
    decided_by = [
        megatron.core.__version__,
        [[manifest.bin_sha256, manifest.idx_sha256] for manifest in manifests],
        tokenizer.sha256,
        data.model_dump(mode="json", exclude={"index_cache", "tokenizer"}),
        sizes,
        seed,
    ]
    return root / hashlib.sha256(json.dumps(decided_by).encode()).hexdigest()[:16]


def microbatches(
    samples: torch.utils.data.Dataset[Sample],
    *,
    first_sample: int,
    num_samples: int,
    num_microbatches: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    context_group: dist.ProcessGroup | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's `num_microbatches` of the samples [first_sample, first_sample + num_samples).

    All have one shape on every rank, as pipeline stages need: where the samples do not fill them, the
    last sample stands in again, with no weight in the loss.

    Yields:
        tokens, labels [B, S] int64, loss_mask [B, S] float32, position_ids [B, S], and attention_mask
        [B, 1, S, S] bool, True where attention is forbidden, if documents are kept apart. Under context
        parallelism all but the mask are this rank's tokens.
    """
    stride = micro_batch_size * data_size
    end = first_sample + num_samples
    for microbatch in range(num_microbatches):
        start = first_sample + microbatch * stride + data_rank * micro_batch_size
        indices = range(start, start + micro_batch_size)
        parts = [samples[min(index, end - 1)] for index in indices]
        batch = {
            name: torch.stack([torch.as_tensor(part[name]) for part in parts]).to(device, non_blocking=True)
            for name in parts[0]
        }
        batch["loss_mask"][max(0, end - start) :] = 0.0
        if context_group is not None and context_group.size() > 1:
            # Attention sees all tokens of a head, so it needs the whole mask.
            batch = {
                name: value if name == "attention_mask" else _context_share(value, context_group)
                for name, value in batch.items()
            }
        yield batch


def _context_share(values_BS: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Chunks c and 2C-1-c of 2C, rank c's tokens by Megatron-core's zigzag.

    Its own function for this takes other arguments in 0.19 than in 0.16.
    """
    chunks = values_BS.chunk(2 * group.size(), dim=1)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim=1)


class ByteLengths:
    """UTF-8 bytes that label tokens stand for, for losses in bits per byte."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._lengths = torch.from_numpy(np.asarray(tokenizer.token_byte_lengths(), dtype=np.int64)).to(
            device
        )

    def __call__(self, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Total bytes of the labels where `mask` is not zero, a scalar tensor."""
        return (self._lengths[labels] * (mask != 0)).sum()
