"""Damaged tensor files and metadata with matching checksums end in one line that states the reason."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from sas_megatron.checkpoint.manifest import DamagedCheckpoint
from sas_megatron.checkpoint.tensor_reading import METADATA, TensorReader
from tests.fuzzing.fixture_files import unpack
from tests.fuzzing.inputs import write_files

WEIGHT = "decoder.final_layernorm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_files(tmp_path, unpack("one_process"))
    return tmp_path / "one_process" / "checkpoints" / "iter_0000002"


def test_an_undamaged_tensor_is_read(checkpoint: Path) -> None:
    assert TensorReader(checkpoint).read(WEIGHT).shape == (12,)


def test_the_reason_of_an_unreadable_tensor_is_one_line_without_a_stack(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PI\x03\x04"))
    with pytest.raises(DamagedCheckpoint) as caught:
        TensorReader(checkpoint).read(WEIGHT)
    message = str(caught.value)
    assert message.startswith(f"{checkpoint}: is damaged: its tensors cannot be read (")
    assert not re.search(r"Traceback|\bFile \"|\n", message)


def describe_as_chunk(metadata: Metadata) -> None:
    tensors: dict[str, Any] = metadata.state_dict_metadata
    tensors[WEIGHT] = tensors[WEIGHT].chunks[0]


def leave_out_properties(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[WEIGHT].properties  # type: ignore[union-attr]


def state_text_for_dtype(metadata: Metadata) -> None:
    tensors: dict[str, Any] = metadata.state_dict_metadata
    tensors[WEIGHT].properties.dtype = "float32"


def enlarge(metadata: Metadata) -> None:
    tensors: dict[str, Any] = metadata.state_dict_metadata
    size = torch.Size([2**60])
    tensors[WEIGHT].size = size
    tensors[WEIGHT].chunks = [ChunkStorageMetadata(offsets=torch.Size([0]), sizes=size)]
    assert MetadataIndex(WEIGHT, torch.Size([0])) in metadata.storage_data


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (describe_as_chunk, "'decoder.final_layernorm.weight' is not described as a tensor"),
        (leave_out_properties, "object has no attribute 'properties'"),
        (state_text_for_dtype, "'decoder.final_layernorm.weight' is not described as a tensor"),
        (enlarge, "allocate"),
    ],
)
def test_metadata_that_describe_no_readable_tensor_are_damage(
    checkpoint: Path, damage: Callable[[Metadata], None], reason: str
) -> None:
    path = checkpoint / METADATA
    metadata = pickle.loads(path.read_bytes())
    damage(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=rf"its tensors cannot be read \(.*{reason}"):
        TensorReader(checkpoint).read(WEIGHT)
