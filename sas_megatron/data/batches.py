"""Token files -> Megatron-core datasets -> the batches of one rank.

The order of the samples is fixed by seed, split, sequence length and the length of the run. Each step reads
the next `global_batch_size` samples; the layout only determines which rank reads which of them. The number of
consumed samples is therefore the only state.
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
from sas_megatron.data.document_split import format_split, split_documents
from sas_megatron.data.epochs import balance_samples
from sas_megatron.data.index_cache import provide_folder
from sas_megatron.data.token_files import load_manifest, read_document_lengths
from sas_megatron.data.tokenizer import Tokenizer

Sample = Mapping[str, torch.Tensor]

# The same for every training seed, so that the validation losses of several seeds are comparable.
VALIDATION_SEED = 0


def build_training_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int
) -> torch.utils.data.Dataset[Sample]:
    """Build a dataset of at least `num_samples` samples of the training documents, shuffled by `seed`.

    Raises:
        FieldError: `data.index_cache` cannot be written.
    """
    return _build_samples(data, tokenizer, num_samples=num_samples, seed=seed, split=0)


def build_validation_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int
) -> torch.utils.data.Dataset[Sample]:
    """Build the dataset of fixed validation windows, which are the same for every seed and layout.

    Raises:
        FieldError: `data.index_cache` cannot be written.
    """
    return _build_samples(data, tokenizer, num_samples=num_samples, seed=VALIDATION_SEED, split=1)


def _build_samples(
    data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int, split: int
) -> torch.utils.data.Dataset[Sample]:
    """Build one split with Megatron-core's builder and the sample indices in the cache.

    `token_files.open_token_files` has checked that no part of the data is empty, for which Megatron-core
    would search forever.
    """
    sizes = [1, 1, 0]
    sizes[split] = num_samples
    parts = [split_documents(read_document_lengths(prefix), data.split)[split] for prefix in data.prefixes]
    weights = balance_samples(data, parts, num_samples=num_samples)
    data = data.model_copy(update={"weights": weights})

    def build(cache: Path) -> Any:
        return BlendedMegatronDatasetBuilder(
            GPTDataset,
            sizes,
            lambda *_arguments: True,
            GPTDatasetConfig(
                random_seed=seed,
                sequence_length=data.sequence_length,
                blend=(data.prefixes, data.weights),
                split=format_split(data.split),
                path_to_cache=str(cache),
                tokenizer=tokenizer,
                reset_position_ids=data.reset_at_document_ends,
                reset_attention_mask=data.reset_at_document_ends,
                eod_mask_loss=False,
                create_attention_mask=data.reset_at_document_ends,
            ),
        ).build()

    cache = index_folder(data, tokenizer, sizes=sizes, seed=seed)
    provide_folder(cache, lambda folder: _write_indices(lambda: build(folder)))
    samples: torch.utils.data.Dataset[Sample] = build(cache)[split]
    return samples


def _write_indices(build: Callable[[], object]) -> None:
    """Call Megatron-core's builder on this rank alone, although it contains barriers.

    Raises:
        OSError: The indices cannot be written. The builder raises another exception from it.
    """
    barrier = dist.barrier
    dist.barrier = lambda *_arguments, **_options: None
    try:
        build()
    except Exception as error:
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None
    finally:
        dist.barrier = barrier


def index_folder(data: DataConfig, tokenizer: Tokenizer, *, sizes: list[int], seed: int) -> Path:
    """Return the folder of the sample indices, named by a hash of everything that determines them.

    The hash includes the contents of the token files. Megatron-core's own cache only uses their paths.
    """
    root = Path(data.index_cache) if data.index_cache else Path(data.prefixes[0]).parent / "index_cache"
    manifests = [load_manifest(prefix) for prefix in data.prefixes]
    determining = [
        megatron.core.__version__,
        [[manifest.bin_sha256, manifest.idx_sha256] for manifest in manifests],
        tokenizer.sha256,
        data.model_dump(mode="json", exclude={"index_cache", "tokenizer", "end_of_document"}),
        sizes,
        seed,
    ]
    return root / hashlib.sha256(json.dumps(determining).encode()).hexdigest()[:16]


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
    """Yield this rank's microbatches of the samples [first_sample, first_sample + num_samples).

    All microbatches have the same shape on every rank, as pipeline stages require. If the samples do not fill
    them, the last sample is repeated with a loss mask of zero.

    Yields:
        tokens and labels [B, S] int64, loss_mask [B, S] float32 and position_ids [B, S]; with
        `data.reset_at_document_ends` also attention_mask [B, 1, S, S] bool, True at masked positions. With
        context parallelism all but attention_mask hold only this rank's tokens.
    """
    stride = micro_batch_size * data_size
    end = first_sample + num_samples
    for microbatch in range(num_microbatches):
        start = first_sample + microbatch * stride + data_rank * micro_batch_size
        indices = range(start, start + micro_batch_size)
        examples = [samples[min(index, end - 1)] for index in indices]
        batch = {
            name: torch.stack([torch.as_tensor(example[name]) for example in examples]).to(
                device, non_blocking=True
            )
            for name in examples[0]
        }
        batch["loss_mask"][max(0, end - start) :] = 0.0
        if context_group is not None and context_group.size() > 1:
            # Attention reads all tokens of a head (Ulysses), so every rank keeps the full mask.
            batch = {
                name: value if name == "attention_mask" else _slice_context(value, context_group)
                for name, value in batch.items()
            }
        yield batch


def _slice_context(values_BS: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return chunks c and 2C-1-c of 2C, the tokens of context rank c in Megatron-core's zigzag order.

    Megatron-core's own function for this has different arguments in 0.16 and 0.19.
    """
    chunks = values_BS.chunk(2 * group.size(), dim=1)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim=1)


class ByteLengths:
    """Number of UTF-8 bytes of the text of label tokens, for losses in bits per byte."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._lengths, self._prefix_lengths = (
            torch.from_numpy(lengths.astype(np.int64)).to(device)
            for lengths in (tokenizer.token_byte_lengths(), tokenizer.prefix_byte_lengths())
        )

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the total number of bytes of the labels where `mask` is not zero, a scalar tensor.

        Args:
            tokens: The token before each label, of the same shape.
            labels: The tokens that are counted.
            mask: The loss mask, of the same shape.
        """
        begins = self._lengths[tokens] == 0  # after a special token; see Tokenizer.count_bytes
        return ((self._lengths[labels] - self._prefix_lengths[labels] * begins) * (mask != 0)).sum()
