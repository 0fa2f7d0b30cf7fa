"""Speed and memory of `prepare_token_files` against sentencepiece alone, and against Megatron-LM."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FileProblem
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.prepare import prepare_token_files

MEMORY_POLL_SECONDS = 0.02

# One process: texts in memory, in one batch, one thread, the fastest kind of result (numpy).
# It waits for a line before it encodes, so that all begin together, and tells tokens and seconds.
BARE_ENCODING = """
import sys, time
import pyarrow.parquet, sentencepiece
path, model, share, shares = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
processor = sentencepiece.SentencePieceProcessor(model_file=model)
texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()[share::shares]
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
encoded = processor.encode(texts, return_type="numpy", num_threads=1)
seconds = time.perf_counter() - started
print(sum(map(len, encoded)), seconds, flush=True)
"""


@dataclass(frozen=True)
class PreparationMeasurement:
    """Medians over repeats that alternate between the two; imports of the processes are left out of both."""

    workers: int
    repeats: int
    tokens: int
    text_bytes: int
    prepare_tokens_per_second: float
    bare_tokens_per_second: float  # as many concurrent processes of sentencepiece alone
    ratio: float
    command_seconds: float  # of the whole command, imports included
    megatron_lm_seconds: float | None  # of Megatron-LM's script, imports included; None if not asked for
    peak_memory_bytes: int  # resident memory of all processes, the command itself included
    peak_memory_bytes_of_triple: int  # of a corpus three times as long


def measure_preparation(
    source_parquet: Path,
    tokenizer_path: Path,
    *,
    workers: int,
    repeats: int = 5,
    megatron_lm: Path | None = None,
) -> dict[str, Any]:
    """Measures and returns the fields of `PreparationMeasurement`; the Parquet file has a column `text`.

    `megatron_lm` is a checkout of Megatron-LM; its `tools/preprocess_data.py` then takes part in every round.
    """
    others_script = _script_of(megatron_lm) if megatron_lm is not None else None
    prepare_speeds: list[float] = []
    bare_speeds: list[float] = []
    command_seconds: list[float] = []
    megatron_lm_seconds: list[float] = []
    tokens = text_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "tokens")
        command = _command(source_parquet, tokenizer_path, prefix, workers)
        json_lines = Path(folder, "texts.jsonl")
        if others_script is not None:
            _write_json_lines(source_parquet, json_lines)
        for _ in range(repeats):
            os.sync()  # what others left unwritten is not for us to wait for
            preparation = prepare_token_files(
                [source_parquet],
                tokenizer_path=tokenizer_path,
                prefix=prefix,
                num_workers=workers,
                overwrite=True,
            )
            tokens, text_bytes = preparation.manifest.num_tokens, preparation.manifest.text_bytes
            prepare_speeds.append(tokens / preparation.encoding_seconds)
            bare_speeds.append(_measure_bare(source_parquet, tokenizer_path, workers))
            command_seconds.append(_time_command(command))
            if others_script is not None:
                seconds, others_bytes = _run_script(others_script, json_lines, tokenizer_path, workers)
                megatron_lm_seconds.append(seconds)
                if others_bytes != prefix.with_suffix(".bin").stat().st_size:
                    raise FileProblem(
                        others_script, "made other tokens of the same texts", "take another version"
                    )
        peak = _measure_memory(command)
        triple = _write_triple(source_parquet, Path(folder, "triple.parquet"))
        peak_of_triple = _measure_memory(_command(triple, tokenizer_path, prefix, workers))
    prepare_speed, bare_speed = statistics.median(prepare_speeds), statistics.median(bare_speeds)
    return asdict(
        PreparationMeasurement(
            workers,
            repeats,
            tokens,
            text_bytes,
            prepare_speed,
            bare_speed,
            prepare_speed / bare_speed,
            statistics.median(command_seconds),
            statistics.median(megatron_lm_seconds) if megatron_lm_seconds else None,
            peak,
            peak_of_triple,
        )
    )


def _measure_bare(source_parquet: Path, tokenizer_path: Path, num_processes: int) -> float:
    """The sum of the tokens a second of concurrent processes, each with its share of the documents."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                BARE_ENCODING,
                source_parquet,
                tokenizer_path,
                str(share),
                str(num_processes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in range(num_processes)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate()[0].split() for process in processes]
    return sum(int(tokens) / float(seconds) for tokens, seconds in results)


def _write_triple(source_parquet: Path, path: Path) -> Path:
    texts = list(stream_documents([source_parquet]))
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for _ in range(3):
            writer.write_table(pa.table({"text": texts}), row_group_size=128)
    return path


def _command(source: Path, tokenizer_path: Path, prefix: Path, workers: int) -> list[str]:
    """In a process of its own, so that what this one has loaded does not count."""
    arguments = ["data", "prepare", str(source), "--tokenizer", str(tokenizer_path), "--output", str(prefix)]
    return [sys.executable, "-m", "sas_megatron", *arguments, "--workers", str(workers), "--overwrite"]


def _time_command(command: list[str], **options: Any) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - begun


def _script_of(checkout: Path) -> Path:
    script = checkout.resolve() / "tools" / "preprocess_data.py"
    if not script.is_file():
        raise FileProblem(script, "is not there", "name a checkout of github.com/NVIDIA/Megatron-LM")
    return script


def _write_json_lines(source_parquet: Path, path: Path) -> None:
    """The only form that Megatron-LM's script reads."""
    with path.open("w") as lines:
        for text in stream_documents([source_parquet]):
            lines.write(json.dumps({"text": text}) + "\n")


def _run_script(script: Path, json_lines: Path, tokenizer_path: Path, workers: int) -> tuple[float, int]:
    """Seconds of Megatron-LM's whole command, and the bytes of tokens that it wrote."""
    prefix = json_lines.with_suffix("")
    files = ["--input", str(json_lines), "--output-prefix", str(prefix)]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer_path)]
    command = [sys.executable, str(script), *files, *tokenizer, "--workers", str(workers), "--append-eod"]
    # Its own copy of Megatron-core comes before the installed one.
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "PYTHONWARNINGS": "ignore"}
    seconds = _time_command(command, env=environment)
    return seconds, Path(f"{prefix}_text_document.bin").stat().st_size


def _measure_memory(command: list[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident_bytes(pid) for pid in _process_tree(process.pid)))
        time.sleep(MEMORY_POLL_SECONDS)
    if process.returncode != 0:
        raise RuntimeError(f"the measured command ended with status {process.returncode}")
    return peak


def _process_tree(process_id: int) -> list[int]:
    try:
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except OSError:
        return []
    return [process_id, *(pid for child in children for pid in _process_tree(int(child)))]


def _resident_bytes(process_id: int) -> int:
    try:
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended in between
    return 0
