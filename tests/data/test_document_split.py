"""The split of documents is that of Megatron-core, and every command refuses data with an empty part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.data.document_split import check_split, count_training_documents, format_split
from sas_megatron.training import entry
from tests.data.preparing import prepare_two_documents
from tests.fork_server import run_command
from tests.scaling.study.studies import write_study
from tests.small_data import SmallData

shares = st.floats(1e-12, 1e3)


def data_config(prefixes: Sequence[str], *, split: Sequence[float], sequence_length: int = 32) -> DataConfig:
    return DataConfig(
        prefixes=list(prefixes), tokenizer="t.model", split=list(split), sequence_length=sequence_length
    )


def lengths(num_documents: int, num_tokens: int = 100) -> npt.NDArray[np.int32]:
    return np.full(num_documents, num_tokens, dtype=np.int32)


@settings(deadline=None)  # the first example imports Megatron-core
@given(st.integers(1, 10**9), shares, shares)
def test_documents_are_cut_where_megatron_core_cuts_them(
    count: int, training: float, validation: float
) -> None:
    """As `BlendedMegatronDatasetBuilder._build_megatron_dataset_splits` of 0.16 to 0.19 does."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    split = [training, validation]
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(format_split(split)))
    ends = [0 if part is None else round(part[1] * count) for part in matrix[:2]]
    assert count_training_documents(count, split) == ends[0]
    assert matrix[1] is None or ends[1] == count


@pytest.mark.parametrize(
    ("document_tokens", "split", "message"),
    [
        ({"T": lengths(3)}, [0.97, 0.03], "leaves no validation documents of T, which has 3 documents; use"),
        ({"T": lengths(16)}, [0.97, 0.03], "no validation documents of T, which has 16 documents; use"),
        ({"T": lengths(3)}, [0.03, 0.97], "no training documents of T, which has 3 documents; use"),
        ({"A": lengths(900), "T": lengths(2)}, [0.97, 0.03], r"of T, which has 2 documents; use \[0\.7\d, "),
        ({"T": lengths(1)}, [0.97, 0.03], "which has 1 document; prepare T from more documents"),
        ({"T": lengths(2, 9)}, [1, 1e-12], "no validation documents of T, which has 2 documents; prepare"),
        (
            {"T": lengths(40, 20)},
            [0.97, 0.03],
            r"sequence_length=32: must be less than the 20 validation tokens of T \(1 of 40 documents\); "
            r"use at most 19, or data\.split=\[0\.96, 0\.04\]",
        ),
        (
            {"T": lengths(2, 32)},
            [0.5, 0.5],
            r"must be less than the 32 training tokens of T \(1 of 2 documents\); use at most 31, or prepare",
        ),
    ],
)  # fmt: skip
def test_a_part_without_a_sample_is_refused_with_a_split_that_would_do(
    document_tokens: Mapping[str, npt.NDArray[np.int32]], split: list[float], message: str
) -> None:
    with pytest.raises(FieldError, match=message) as refused:
        check_split(data_config(list(document_tokens), split=split), document_tokens)
    if found := re.search(r"(?:use |split=)\[([\d.]+), ([\d.]+)\]$", str(refused.value)):
        offered = [float(share) for share in found.groups()]
        check_split(data_config(list(document_tokens), split=offered), document_tokens)
    else:
        assert "prepare" in str(refused.value)


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=3), shares, shares
)
def test_accepted_parts_have_more_tokens_than_a_sample(
    documents: list[list[int]], training: float, validation: float
) -> None:
    document_tokens = {f"p{index}": np.array(tokens, np.int32) for index, tokens in enumerate(documents)}
    split = [training, validation]
    parts = [
        part.sum()
        for tokens in document_tokens.values()
        for part in np.split(tokens, [count_training_documents(len(tokens), split)])
    ]
    data = data_config(list(document_tokens), split=split)
    if min(parts) > data.sequence_length:
        check_split(data, document_tokens)
    else:
        with pytest.raises(FieldError, match=r"; use |; prepare "):
            check_split(data, document_tokens)


def test_every_command_refuses_data_without_validation_documents(
    small_data: SmallData, tmp_path: Path
) -> None:
    """Megatron-core would search for the tokens of the empty part forever."""
    few_documents = prepare_two_documents(small_data, tmp_path)
    config = small_data.run(tmp_path / "run", data={"prefixes": [str(few_documents)], "split": [0.97, 0.03]})
    expected = (
        f"data.split=[0.97, 0.03]: leaves no validation documents of {few_documents}, which has 2 documents; "
        "use [0.74, 0.26]"
    )
    with pytest.raises(FieldError) as refused:
        entry.check_run(config, world_size=1)
    assert str(refused.value) == expected
    study = write_study(
        tmp_path,
        config.model_dump(mode="json"),
        variants={"mha": {}, "gqa": {"num_kv_heads": 2}},
        sizes={"one": {}},
    )
    (tmp_path / "config.yaml").write_text((tmp_path / "base.yaml").read_text())
    for arguments in (["train", tmp_path / "config.yaml"], ["study", "plan", study], ["study", "run", study]):
        done = run_command(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert done.stderr.splitlines()[0] == f"sas-megatron: error: {expected}"
        # `train` prints the command with the split.
        tried = [f"sas-megatron: try: sas-megatron train {tmp_path}/config.yaml 'data.split=[0.74, 0.26]'"]
        assert done.stderr.splitlines()[1:] == (tried if arguments[0] == "train" else [])
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "study").exists()
