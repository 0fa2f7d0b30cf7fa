"""What each fuzz target reads, and the valid files that are damaged.

A target calls the command itself in the child, or what the command calls before it would train or start other
processes.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from sas_megatron.config.attention import KINDS
from sas_megatron.config.loading import dump_tree, known_keys
from tests.fork_server import ROOT
from tests.fuzzing.child import Seeds, Target, run_command
from tests.fuzzing.inputs import Files
from tests.run_configs import small_tree

CONFIG_FIELDS = tuple(key for key in known_keys() if "." in key)
OVERRIDE_VALUES = (
    *(
        "",
        "null",
        "true",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "0.5",
        "1e308",
        ".nan",
        ".inf",
        "x",
        "[]",
        "{}",
        "[1]",
    ),
    *(
        "[a, b]",
        "{a: 1}",
        "4294967295",
        "4294967296",
        "9007199254740992",
        "9007199254740993",
        "1e400",
        "&a [*a]",
    ),
    *(
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 3000,
        "2020-13-45",
        "!!int x",
        "a: b: c",
        "'",
        "%",
        "\t",
        "|",
        "- 1",
    ),
)
# The fields of other attentions than mha.
ATTENTION_FIELDS = {
    "gqa": {"num_kv_heads": 2},
    "mfa": {"query_rank": 8},
    "mla": {"rotary_head_dim": 4, "kv_lora_rank": 12, "query_lora_rank": 8},
    "sas": {"head_expansion": 2},
}
FIXTURES = ROOT / "tests" / "checkpoint" / "fixtures"
STUDY = ROOT / "tests" / "scaling" / "fixtures" / "study"


def _build_configs() -> Seeds:
    trees = {
        kind: small_tree(
            attention={"kind": kind, "num_heads": 4, "head_dim": 6, **ATTENTION_FIELDS.get(kind, {})}
        )
        for kind in KINDS
    }
    trees["layout"] = small_tree(
        parallel={"tensor": 2, "sequence": True, "pipeline": 2, "context": 2},
        schedule={"kind": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 2},
        optimizer={"distributed": True},
        checkpoint={"interval": 2, "at_steps": [1, 3], "keep_last": 2},
        data={"weights": [1.0], "split": [0.9, 0.1]},
    )
    return {name: {"config.yaml": dump_tree(tree).encode()} for name, tree in trees.items()}


def _run_config(arguments: tuple[str, ...]) -> None:
    command = ("train", "--dry-run") if arguments[0] == "--" else ("costs",)
    run_command(*command, *arguments)


def _build_studies() -> Seeds:
    base = dump_tree(small_tree()).encode()
    study: dict[str, Any] = {
        "base": "base.yaml",
        "directory": "study",
        "variants": {"mha": {}, "sas": {"head_expansion": 2}},
        "sizes": {"small": {"model.num_layers": 1}, "large": {"model.num_layers": 2}},
        "budgets": {"tokens": [2000, 4000]},
        "match": "none",
    }
    variations: dict[str, dict[str, Any]] = {
        "grid": {},
        "isoflop": {"budgets": {"flops": [1e9, 2e9]}, "trunks": "none", "seeds": 2},
        "sweep": {
            "learning_rate": {"rule": "sweep", "factors": [0.5, 1.0, 2.0]},
            "seeds": {"mha": 2, "sas": 1},
        },
        "axes": {
            "axes": {"length": {"s12": {"data.sequence_length": 12}, "s24": {"data.sequence_length": 24}}},
            "machine": {"processes": 1, "teraflops": 1.0, "price_per_hour": 2.0},
            "seed_noise": 0.01,
        },
        "matched": {"match": "params", "tolerance": 0.5, "sizes": {"small": {"model.num_layers": 1}}},
    }
    files = {
        name: {"study.yaml": dump_tree(study | changes).encode(), "base.yaml": base}
        for name, changes in variations.items()
    }
    recorded = ("layouts.json", "learning_rates.json", "step_seconds.json")
    files["recorded"] = {
        **{name: (STUDY / name).read_bytes() for name in ("study.yaml", "base.yaml")},
        **{f"study/{name}": (STUDY / "study" / name).read_bytes() for name in recorded},
    }
    return files


def _run_study(arguments: tuple[str, ...]) -> None:
    run_command("study", "plan", "study.yaml", *arguments)


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
    }
    for name, column in columns.items():
        table = pa.table({"text": column, "id": pa.array(range(len(texts)))})
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
    return {name: {name: content} for name, content in files.items()}


def _run_documents(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.data.documents import stream_documents

    for text in stream_documents(["."]):
        text.encode()


def unpack(*names: str, folder: str | None = None) -> Files:
    """Return the files of archives in the fixtures, under their paths, or with `folder` as the first folder."""
    files: Files = {}
    for name in names:
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                if content is not None:
                    first, _, rest = member.name.partition("/")
                    files[f"{folder or first}/{rest}"] = content.read()
    return files


def _build_tokens() -> Seeds:
    files = {Path(path).name: content for path, content in unpack("data").items()}
    return {"tokens": {**files, "config.yaml": (FIXTURES / "one_process.yaml").read_bytes()}}


def _run_tokens(arguments: tuple[str, ...]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    _succeed("data", "inspect", "text", "--tokenizer", "tokenizer.model", *arguments)
    fields = ("data.prefixes=[text]", "data.tokenizer=tokenizer.model")
    _succeed("train", "--check", "config.yaml", *fields, "logging.run_directory=none")
    # As training reads them.
    for tokens in IndexedDataset("text", multimodal=False, mmap=True):
        assert tokens.min() >= 0
        assert tokens.max() < 320


def _build_tokenizers() -> Seeds:
    return {"tokenizer": {"tokenizer.model": unpack("data")["data/tokenizer.model"]}}


def _run_tokenizer(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.data.tokenizer import Tokenizer

    tokenizer = Tokenizer("tokenizer.model")
    text = "the run of a model: \u2581 été\n\t\0 👍"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.decode(range(tokenizer.vocab_size))
    assert len(tokenizer.token_byte_lengths()) == tokenizer.vocab_size


def exported_model() -> Files:
    """Return the files of a model that an earlier version exported."""
    return {Path(name).name: content for name, content in unpack("exported").items()}


def _build_models() -> Seeds:
    from tests.fuzzing.small_models import small_models

    return {"exported": exported_model(), **small_models()}


def _run_import(_arguments: tuple[str, ...]) -> None:
    try:
        _succeed("checkpoint", "import", ".", "--output", "../imported")
    finally:
        shutil.rmtree("../imported", ignore_errors=True)


def _build_runs() -> Seeds:
    files = unpack("data") | unpack("one_process", folder="run")
    files["config.yaml"] = (FIXTURES / "one_process.yaml").read_bytes()
    study = {
        str(path.relative_to(STUDY)).replace("study/runs/", "run/"): path.read_bytes()
        for path in STUDY.rglob("*")
        if path.is_file()
    }
    study = {path: content for path, content in study.items() if not path.startswith("study/logs")}
    return {"run": files, "study": study}


def _run_run(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.evaluation.model_source import find_model_source
    from sas_megatron.scaling.runs import load_run

    if Path("study.yaml").exists():
        # The table is written where the study's runs are not: their folder is damaged.
        Path("study/runs").unlink(missing_ok=True)
        Path("study/runs").symlink_to("../run")
        _succeed("study", "collect", "study.yaml", "--output", "../table.parquet")
        return
    _succeed("train", "--check", "config.yaml", "checkpoint.resume=true", "logging.run_directory=run")
    load_run("run")
    find_model_source(Path("run"))


def _build_checkpoints() -> Seeds:
    return {"checkpoint": unpack("data") | unpack("one_process", folder="run")}


def _run_checkpoint(_arguments: tuple[str, ...]) -> None:
    _succeed("checkpoint", "verify", "run")
    try:
        _succeed("checkpoint", "export", "run", "--output", "../exported")
    finally:
        shutil.rmtree("../exported", ignore_errors=True)


def _succeed(*arguments: str) -> None:
    """Run a command; return if its exit status is 0."""
    try:
        run_command(*arguments)
    except SystemExit as ending:
        if ending.code not in (0, None):
            raise


CONFIGS = Target(_build_configs, _run_config, ("--", "config.yaml"))
STUDIES = Target(_build_studies, _run_study)
DOCUMENTS = Target(_build_documents, _run_documents)
TOKENS = Target(_build_tokens, _run_tokens)
TOKENIZERS = Target(_build_tokenizers, _run_tokenizer)
MODELS = Target(_build_models, _run_import)
RUNS = Target(_build_runs, _run_run)
CHECKPOINTS = Target(_build_checkpoints, _run_checkpoint)
