"""The samples of each step, which are the same at any layout, and the windows and bytes of an evaluation."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.token_files import open_token_files
from tests.rank_pool import in_layout
from tests.small_data import SmallData


def tokens_of_step(config: RunConfig, step: int, data_rank: int, data_size: int) -> list[list[int]]:
    from sas_megatron.data.batches import build_training_samples, microbatches

    in_layout(ParallelConfig())
    tokenizer = open_token_files(config.data, vocab_size=config.model.vocab_size)
    samples = build_training_samples(config.data, tokenizer, num_samples=160, seed=config.training.seed)
    batches = microbatches(
        samples,
        first_sample=step * config.training.global_batch_size,
        num_samples=config.training.global_batch_size,
        num_microbatches=config.training.global_batch_size // config.training.micro_batch_size // data_size,
        micro_batch_size=config.training.micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        device=torch.device("cpu"),
    )
    return [row.tolist() for batch in batches for row in batch["tokens"]]


def test_data_ranks_read_each_sample_of_a_step_once(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(tmp_path, training={"global_batch_size": 12, "micro_batch_size": 3})
    [single_rank] = ranks(1).run(tokens_of_step, config, 2, 0, 1)
    by_rank = [ranks(1).run(tokens_of_step, config, 2, rank, 4)[0] for rank in range(4)]
    assert len(single_rank) == 12
    assert sorted(single_rank) == sorted(row for rows in by_rank for row in rows)
    [next_step] = ranks(1).run(tokens_of_step, config, 3, 0, 1)
    assert not set(map(tuple, single_rank)) & set(map(tuple, next_step)), "steps must not repeat samples"


def reads_of_a_rank(config: RunConfig) -> tuple[list[int], list[list[int]]]:
    """Return the samples that a rank reads for three steps, and the tokens; after the second it resumes."""
    from sas_megatron.data.validation_sets import UNNAMED
    from sas_megatron.training.run_data import RunData

    topology = in_layout(config.parallel)
    data = RunData(config, topology)
    samples, read = data._training_samples, []

    class Recorded:
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return samples[index]

    data._training_samples = Recorded()  # type: ignore[assignment]
    batches = [batch for first in (0, 4, 16) for batch in data.training_batches(first)]
    batches += list(data.validation_batches()[UNNAMED])
    return sorted(set(read)), [row.tolist() for batch in batches for row in batch.get("tokens", [])]


def test_only_the_first_and_the_last_pipeline_stage_read_samples(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(
        tmp_path,
        model={"num_layers": 4},
        parallel={"pipeline": 4},
        training={"global_batch_size": 4, "micro_batch_size": 1, "num_steps": 5},
    )
    first, second, third, last = ranks(4).run(reads_of_a_rank, config)
    assert second == third == ([], [])
    assert first[1] == last[1]
    # The thread has read on after the second step, as far as it had time, and stops at the end of the run.
    for read, _ in (first, last):
        assert {*range(8), *range(16, 20)} <= set(read) <= set(range(20))
    masked = small_data.run(
        tmp_path,
        model={"num_layers": 4},
        parallel={"pipeline": 4},
        training={"global_batch_size": 4, "micro_batch_size": 1, "num_steps": 5},
        data={"reset_at_document_ends": True},
    )
    assert all(tokens == first[1] for _, tokens in ranks(4).run(reads_of_a_rank, masked))


def test_batches_read_ahead_equal_those_of_each_step(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(
        tmp_path, training={"global_batch_size": 4, "micro_batch_size": 2, "num_steps": 40}
    )
    [(_, tokens)] = ranks(1).run(reads_of_a_rank, config)
    expected = [row for step in (0, 1, 4) for row in ranks(1).run(tokens_of_step, config, step, 0, 1)[0]]
    assert tokens[:12] == expected


def held_out(config: RunConfig) -> tuple[list[list[int]], float, float, int]:
    """Return the labels of the validation windows, and the evaluation of a model with uniform predictions.

    The evaluation is given as loss, bits per byte and number of bytes.
    """
    from sas_megatron.data.batches import ByteLengths, build_validation_samples, microbatches
    from sas_megatron.data.validation_sets import UNNAMED
    from sas_megatron.evaluation.held_out import evaluate_held_out

    topology = in_layout(ParallelConfig())
    tokenizer = open_token_files(config.data, vocab_size=config.model.vocab_size)
    count = config.evaluation.num_sequences
    samples = build_validation_samples(config.data, tokenizer, num_samples=count)

    def batches() -> Any:
        return microbatches(
            samples,
            first_sample=0,
            num_samples=count,
            num_microbatches=3,  # the second is padded to four windows, the third is all padding
            micro_batch_size=4,
            data_rank=0,
            data_size=1,
            device=topology.device,
        )

    class Uniform(torch.nn.Module):
        def forward(self, tokens: Any, positions: Any, mask: Any, labels: Any) -> torch.Tensor:
            return torch.full(labels.shape, math.log(512.0))

    def run_forward(forward_step: Any) -> list[dict[str, torch.Tensor]]:
        model, remaining, reports = Uniform(), batches(), []
        for _ in range(3):
            losses, report_of = forward_step(remaining, model)
            reports.append(report_of(losses)[2])
        return reports

    labels = [
        row.tolist()
        for batch in batches()
        for row, mask in zip(batch["labels"], batch["loss_mask"], strict=True)
        if mask.any()
    ]
    result = evaluate_held_out(
        lambda forward_step, _batches: run_forward(forward_step),
        {UNNAMED: iter(())},
        byte_lengths=ByteLengths(tokenizer, topology.device),
        topology=topology,
    )
    return labels, result.loss, result.bits_per_byte, result.num_bytes


def test_validation_windows_do_not_depend_on_the_seed(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    [first] = ranks(1).run(held_out, small_data.run(tmp_path, training={"seed": 1}))
    [second] = ranks(1).run(held_out, small_data.run(tmp_path, training={"seed": 2}))
    assert first[0] == second[0]


def test_token_files_shorter_than_a_sample_are_refused(small_data: SmallData, tmp_path: Path) -> None:
    """Megatron-core would search these files for the tokens of a sample forever."""
    (tmp_path / "text.txt").write_text("x")
    prefix = tmp_path / "small"
    prepare_token_files([tmp_path / "text.txt"], tokenizer_path=small_data.tokenizer, prefix=prefix)
    config = small_data.run(tmp_path / "run", data={"prefixes": [str(small_data.prefix), str(prefix)]})
    with pytest.raises(FieldError) as refused:
        open_token_files(config.data, vocab_size=512)
    assert str(refused.value).startswith(
        f"data.sequence_length=40: must be less than the 2 tokens of {prefix};"
    )


def test_bits_per_byte_counts_the_bytes_of_the_decoded_labels(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(tmp_path)
    [(labels, loss, bits_per_byte, num_bytes)] = ranks(1).run(held_out, config)
    tokenizer = open_token_files(config.data, vocab_size=512)
    num_label_bytes = sum(len(tokenizer.decode_bytes(row)) for row in labels)
    assert len(labels) == 6
    assert num_bytes == num_label_bytes
    assert loss == pytest.approx(math.log(512))
    assert bits_per_byte == pytest.approx(len(labels) * 40 * 9 / num_label_bytes)


def losses_with_other_first_document(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the token losses of a sample, with its own and with another first document.

    The third result is the position of the token that ends the first document.
    """
    from sas_megatron.data.batches import build_training_samples, microbatches
    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.language_loss import token_losses

    in_layout(ParallelConfig())
    tokenizer = open_token_files(config.data, vocab_size=512)
    samples = build_training_samples(config.data, tokenizer, num_samples=2000, seed=1)
    for index in range(2000):
        sample = samples[index]
        ends = (sample["tokens"] == tokenizer.eod).nonzero().flatten().tolist()
        if ends and 5 < ends[0] < 30:
            break
    else:
        raise AssertionError("no sample contains a document end")
    (model,) = build_gpt_chunks(config)
    model.eval()
    (batch,) = microbatches(
        samples,
        first_sample=index,
        num_samples=1,
        num_microbatches=1,
        micro_batch_size=1,
        data_rank=0,
        data_size=1,
        device=torch.device("cpu"),
        with_segments=config.data.reset_at_document_ends,
    )

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        return token_losses(model, {**batch, "tokens": tokens}).detach()[0]

    other = batch["tokens"].clone()
    other[0, : ends[0]] = (other[0, : ends[0]] + 7) % 500
    return losses(batch["tokens"]), losses(other), ends[0]


@pytest.mark.parametrize("reset", [True, False])
def test_documents_are_independent_only_with_reset_at_document_ends(
    ranks: Any, small_data: SmallData, tmp_path: Path, reset: bool
) -> None:
    config = small_data.run(tmp_path, data={"reset_at_document_ends": reset})
    [(before, after, end)] = ranks(1).run(losses_with_other_first_document, config)
    assert not torch.equal(before[:end], after[:end])
    assert torch.equal(before[end + 1 :], after[end + 1 :]) is reset


def test_a_tokenizer_that_did_not_write_the_data_is_refused(small_data: SmallData, tmp_path: Path) -> None:
    from sas_megatron.data.tokenizer_training import train_tokenizer

    other = tmp_path / "other.model"
    train_tokenizer(["some text, and some more of it\n" * 50], vocab_size=300, model_path=other)
    config = small_data.run(tmp_path, data={"tokenizer": str(other)})
    with pytest.raises(FieldError, match=r"data\.tokenizer=.*is not the tokenizer that encoded"):
        open_token_files(config.data, vocab_size=512)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(tmp_path)
    with pytest.raises(
        FieldError, match=r"model\.vocab_size=300: must not be less than the 512 tokens .*; use 512"
    ):
        open_token_files(config.data, vocab_size=300)


def test_damaged_token_files_are_refused_before_a_run(small_data: SmallData, tmp_path: Path) -> None:
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"text{ending}").write_bytes(small_data.prefix.with_suffix(ending).read_bytes())
    tokens = bytearray((tmp_path / "text.bin").read_bytes())
    tokens[1001] ^= 1
    (tmp_path / "text.bin").write_bytes(tokens)
    config = small_data.run(tmp_path / "run", data={"prefixes": [str(tmp_path / "text")]})
    open_token_files(config.data, vocab_size=512)
    with pytest.raises(FileProblem, match=r"text\.bin: has changed since it was written \(sha256\)"):
        open_token_files(config.data, vocab_size=512, verify=True)


def test_rewritten_token_files_get_new_indices(small_data: SmallData, tmp_path: Path) -> None:
    from sas_megatron.data.batches import index_folder

    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"text{ending}").write_bytes(small_data.prefix.with_suffix(ending).read_bytes())
    data = small_data.run(tmp_path / "run", data={"prefixes": [str(tmp_path / "text")]}).data
    tokenizer = open_token_files(data, vocab_size=512)

    def folder(sizes: tuple[int, int, int] = (8, 1, 0), seed: int = 1) -> Path:
        return index_folder(data, tokenizer, sizes=list(sizes), seed=seed)

    before = folder()
    assert before.parent == tmp_path / "index_cache"
    manifest = (tmp_path / "text.json").read_text()
    sha256 = json.loads(manifest)["bin_sha256"]
    (tmp_path / "text.json").write_text(manifest.replace(sha256, sha256[::-1]))
    assert folder() != before
    assert len({folder(), folder(sizes=(9, 1, 0)), folder(seed=2)}) == 3, "other samples have other indices"


def blended_documents(config: RunConfig, num_samples: int) -> list[int]:
    """Count the samples from each of two token files, whose documents contain `q` or `z`."""
    from sas_megatron.data.batches import build_training_samples

    in_layout(ParallelConfig())
    tokenizer = open_token_files(config.data, vocab_size=512)
    samples = build_training_samples(config.data, tokenizer, num_samples=num_samples, seed=1)
    texts = [tokenizer.decode(samples[index]["tokens"].tolist()) for index in range(num_samples)]
    return [sum(letter in text for text in texts) for letter in ("q", "z")]


def test_blends_follow_their_weights(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    from sas_megatron.data.prepare import prepare_token_files

    prefixes = []
    for letter in ("q", "z"):
        (tmp_path / letter).mkdir()
        for index in range(20):
            (tmp_path / letter / f"{index}.txt").write_text(f"{letter} {index} " * 200)
        prefixes.append(str(tmp_path / f"tokens_{letter}"))
        prepare_token_files(
            [tmp_path / letter], tokenizer_path=small_data.tokenizer, prefix=prefixes[-1], num_workers=1
        )
    config = small_data.run(tmp_path / "run", data={"prefixes": prefixes, "weights": [3.0, 1.0]})
    [counts] = ranks(1).run(blended_documents, config, 80)
    assert counts == [60, 20]


def threads_after_a_released_reader(config: RunConfig) -> list[bool]:
    """Return whether a rank's thread reads ahead while the data of a run exist, and afterwards."""
    from sas_megatron.training.run_data import RunData

    topology = in_layout(config.parallel)
    found = []
    data = RunData(config, topology)
    next(data.training_batches(0))
    found.append(any(thread.name == "read ahead" for thread in threading.enumerate()))
    del data
    gc.collect()
    deadline = time.monotonic() + 10
    while (
        any(thread.name == "read ahead" for thread in threading.enumerate()) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    found.append(any(thread.name == "read ahead" for thread in threading.enumerate()))
    return found


def test_the_reading_thread_ends_with_the_data_of_its_run(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    assert ranks(1).run(threads_after_a_released_reader, small_data.run(tmp_path)) == [[True, False]]
