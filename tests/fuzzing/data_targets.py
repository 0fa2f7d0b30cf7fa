"""The fuzz targets of data: documents, token files and tokenizer models."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path

from tests.data.tokenizer_kinds import write_byte_level, write_llama2_json, write_tiktoken
from tests.fuzzing.child import Seeds, Target, run_successfully
from tests.fuzzing.fixture_files import FIXTURES, unpack
from tests.fuzzing.inputs import Files


def _build_documents() -> Seeds:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one text", "zwei Wörter", "", None, "three\nlines\n\u2581 here", "x" * 300]
    rows = [{"text": text, "meta": {"source": "a", "n": [1, 2]}} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    plain = b"Ein Text.\nMit zwei Zeilen.\n"
    files: Files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "a.txt": plain,
        "a.txt.gz": gzip.compress(plain),
        "a.md": plain,
    }
    columns = {
        "string": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "view": pa.array(texts, pa.string_view()),
        "bytes": pa.array([text and text.encode() for text in texts]),
    }
    for name, column in columns.items():
        inner = pa.StructArray.from_arrays([column, column], names=["text", "other"])
        table = pa.table({"text": column, "id": pa.array(range(len(texts))), "meta": inner})
        for kind in ("stream", "file"):
            sink = io.BytesIO()
            opener = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with opener(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
            files[f"{name}_{kind}.arrow"] = sink.getvalue()
        if name != "view":
            sink = io.BytesIO()
            pq.write_table(table, sink, row_group_size=4)
            files[f"{name}.parquet"] = sink.getvalue()
    compressed = io.BytesIO()
    table = pa.table({"text": pa.array(texts)})
    with pa.ipc.new_file(
        compressed, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as writer:
        writer.write_table(table)
    files["compressed.feather"] = compressed.getvalue()
    shard = files["string_stream.arrow"]
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "0",
        "_split": "train",
    }
    saved = {
        "dataset_dict.json": json.dumps({"splits": ["train"]}).encode(),
        "train/state.json": json.dumps(state).encode(),
        "train/dataset_info.json": b'{"features": {"text": {"dtype": "string", "_type": "Value"}}}',
        "train/data-00000-of-00001.arrow": shard,
    }
    return {"saved": saved, **{name: {name: content} for name, content in files.items()}}


def _run_documents(arguments: tuple[str, ...]) -> None:
    from sas_megatron.data.documents import stream_documents

    for text in stream_documents(["."], text_column=arguments[0] if arguments else "text"):
        text.encode()


def _build_tokens() -> Seeds:
    files = {Path(path).name: content for path, content in unpack("data").items()}
    return {"tokens": {**files, "config.yaml": (FIXTURES / "one_process.yaml").read_bytes()}}


def _run_tokens(arguments: tuple[str, ...]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    run_successfully("data", "inspect", "text", "--tokenizer", "tokenizer.model", *arguments)
    fields = ("data.prefixes=[text]", "data.tokenizer=tokenizer.model")
    run_successfully("train", "--check", "config.yaml", *fields, "logging.run_directory=none")
    # As training reads them.
    for tokens in IndexedDataset("text", multimodal=False, mmap=True):
        assert tokens.min() >= 0
        assert tokens.max() < 320


def _build_tokenizers() -> Seeds:
    seeds = {"tokenizer": {"tokenizer.model": unpack("data")["data/tokenizer.model"]}}
    for name, write in (
        ("json", write_byte_level),
        ("llama", write_llama2_json),
        ("tiktoken", write_tiktoken),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder))
            seeds[name] = {path.name: path.read_bytes()}
    return seeds


def _run_tokenizer(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(Path())
    text = "the run of a model: \u2581 été\n\t\0 👍"
    decoded = tokenizer.decode(tokenizer.encode(text))
    # A damaged table of a library can give a token other bytes than the text that it stands for.
    assert decoded == text or not tokenizer.is_exact or "tokenizer.model" not in tokenizer.files
    tokenizer.decode(range(tokenizer.vocab_size))
    assert len(tokenizer.token_byte_lengths()) == tokenizer.vocab_size


DOCUMENTS = Target(_build_documents, _run_documents)
TOKENS = Target(_build_tokens, _run_tokens)
TOKENIZERS = Target(_build_tokenizers, _run_tokenizer)
