"""Folders that hold more than documents: datasets saved by Hugging Face datasets, descriptions, manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sas_megatron.config.errors import FileProblem
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.sources import find_source_files
from tests.data.damaged_files import write_table

TEXTS = [f"document {number}" for number in range(11)]


def save_dataset(folder: Path, texts: list[str], *, num_shards: int = 1) -> None:
    """Save with the library itself."""
    import datasets

    datasets.disable_progress_bars()
    table = {"text": texts, "id": list(range(len(texts)))}
    datasets.Dataset.from_dict(table).save_to_disk(folder, num_shards=num_shards)


def write_dataset(folder: Path, shards: dict[str, list[str]], **state: object) -> Path:
    """Write the files of a saved dataset, with the shards in the given order."""
    folder.mkdir(parents=True)
    for name, texts in shards.items():
        (folder / name).write_bytes(write_table({"text": texts}))
    files = [{"filename": name} for name in shards]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **state}, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    return folder


def test_saved_dataset_and_its_splits_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    save_dataset(tmp_path / "saved", TEXTS, num_shards=3)
    assert list(stream_documents([tmp_path / "saved"])) == TEXTS
    assert caplog.messages == []
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "extra")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    assert list(stream_documents([tmp_path / "splits"])) == ["train", "test", "extra"]
    (message,) = caplog.messages
    assert message == (
        f"{tmp_path}/splits: reads all splits of the saved dataset: train, test, extra; name "
        f"{tmp_path}/splits/train to read one"
    )
    assert list(stream_documents([tmp_path / "splits" / "test"])) == ["test"]
    both = [tmp_path / "splits" / "extra", tmp_path / "saved"]
    assert list(stream_documents(both)) == ["extra", *TEXTS]


def test_only_the_listed_shards_are_read_in_their_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_dataset(tmp_path / "corpus" / "saved", {"b.arrow": ["first"], "a.arrow": ["second"]})
    (folder / "cache-1f.arrow").write_bytes(write_table({"text": ["a copy"]}))
    (folder / "README.md").write_text("about the data")
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "zeroth"}\n')
    assert list(stream_documents([tmp_path / "corpus"])) == ["zeroth", "first", "second"]
    assert caplog.messages == [
        f"{tmp_path}/corpus: reads files of several formats: JSON lines (1), Arrow (2)",
        f"{tmp_path}/corpus: left out files that a saved dataset does not list (2)",
    ]


def test_incomplete_saved_datasets_are_refused(tmp_path: Path) -> None:
    missing = write_dataset(tmp_path / "missing", {"a.arrow": ["a"], "b.arrow": ["b"]})
    (missing / "b.arrow").unlink()
    selection = write_dataset(
        tmp_path / "selection", {"a.arrow": ["a"]}, _indices_data_files=[{"filename": "i"}]
    )
    outside = write_dataset(tmp_path / "outside", {"../a.arrow": ["a"]})
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for folder, message in (
        (missing, r"state\.json: lists 'b\.arrow', which is not in the folder; save the dataset again"),
        (selection, r"state\.json: has a selection of rows; call flatten_indices\(\) first"),
        (outside, r"state\.json: lists '\.\./a\.arrow', which is not in the folder"),
        (splits, r"dataset_dict\.json: lists 'train', which is not in the folder"),
    ):
        with pytest.raises(FileProblem, match=message):
            find_source_files([folder])


def test_json_files_without_documents_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "tokens.json": json.dumps({"schema_version": 1, "num_documents": 3}, indent=2),
        "info.json": '{"splits": ["train"]}',
        "special.json": '["<s>", "</s>"]',
        "one.json": '{"text": "a"}',
        "lines.json": '{"text": "b"}\n{"text": null}\n',
        "state.json": '{"step": 7}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert list(stream_documents([tmp_path])) == ["b", "a"]
    assert caplog.messages == [f"{tmp_path}: left out JSON files without documents (4)"]
    for name, text in (
        ("list.json", '[{"text": "a"}]'),
        ("cut.json", '{"text": "a"}\n{"text": "b'),
        ("other.jsonl", '{"body": "a"}'),
        ("other.json", '{"body": "a"}\n{"body": "b"}\n'),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(Exception, match=name.replace(".", r"\.")):
            list(stream_documents([tmp_path]))
        path.unlink()
    (tmp_path / "one.json").unlink()
    (tmp_path / "lines.json").unlink()
    with pytest.raises(FileProblem, match=r"has no documents \(JSON files without documents \(4\) were left"):
        find_source_files([tmp_path])


def test_a_text_field_of_another_name_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"meta": {"body": "a"}}')
    assert list(stream_documents([tmp_path], text_column="meta.body")) == ["a"]
    with pytest.raises(FileProblem, match="has no documents"):
        stream_documents([tmp_path], text_column="body")
    (tmp_path / "b.arrow").write_bytes(write_table({"text": ["b"]}))
    assert list(stream_documents([tmp_path], text_column="text")) == ["b"]
