"""Speed and memory of `prepare_token_files`, against the tokenizer's library and Megatron-LM."""

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
from sas_megatron.data.tokenizer_loading import load_tokenizer

MEMORY_POLL_SECONDS = 0.02

# Definitions of `encode` with a library alone, by the file of a tokenizer: texts in memory, one batch, one
# thread, into the fastest type of result.
BARE_LIBRARIES = {
    "tokenizer.model": """
import sentencepiece
processor = sentencepiece.SentencePieceProcessor(model_file=model)
encode = lambda texts: processor.encode(texts, return_type="numpy", num_threads=1)
""",
    "tokenizer.json": """
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(model)
encode = lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
""",
    "tokenizer.tiktoken": """
from sas_megatron.data.tokenizer_loading import load_tokenizer
encoding = load_tokenizer(model)._encoding
encode = lambda texts: [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
""",
}
# A process that waits for a line of input before it encodes, so that all processes start together. Then it
# prints tokens and seconds.
BARE_ENCODING = """
import sys, time
import pyarrow.parquet
path, model, share, shares, library = *sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5]
exec(library)
texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()[share::shares]
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
encoded = encode(texts)
seconds = time.perf_counter() - started
print(sum(map(len, encoded)), seconds, flush=True)
"""


@dataclass(frozen=True)
class PreparationMeasurement:
    """Medians over rounds that alternate between the command and bare processes; imports are not timed."""

    workers: int
    repeats: int
    tokens: int
    text_bytes: int
    prepare_tokens_per_second: float
    bare_tokens_per_second: float  # the same number of concurrent processes with only the library
    ratio: float
    command_seconds: float  # complete command, imports included
    megatron_lm_seconds: float | None  # Megatron-LM's script, imports included; None if not requested
    peak_memory_bytes: int  # resident memory of the command and all its processes
    peak_memory_bytes_of_triple: int  # the same for a corpus three times as long


def measure_preparation(
    source_parquet: Path,
    tokenizer_path: Path,
    *,
    workers: int,
    repeats: int = 5,
    megatron_lm: Path | None = None,
) -> dict[str, Any]:
    """Measure the data preparation.

    Args:
        source_parquet: Parquet file with a column `text`.
        tokenizer_path: The tokenizer, as in `load_tokenizer`.
        workers: Number of worker processes.
        repeats: Number of rounds.
        megatron_lm: Checkout of Megatron-LM, whose `tools/preprocess_data.py` then runs in every round.

    Returns:
        The fields of `PreparationMeasurement`.

    Raises:
        FileProblem: The script of Megatron-LM is missing, or produced other tokens.
        RuntimeError: The measured command failed.
    """
    megatron_script = _find_megatron_script(megatron_lm) if megatron_lm is not None else None
    with tempfile.TemporaryDirectory() as folder:
        if megatron_script is not None:
            _write_json_lines(source_parquet, _json_lines(Path(folder)))
        rounds = [
            _measure_round(source_parquet, tokenizer_path, Path(folder), workers, megatron_script)
            for _ in range(repeats)
        ]
        prefix = Path(folder, "tokens")
        peak = _measure_memory(_command(source_parquet, tokenizer_path, prefix, workers))
        triple = _write_triple(source_parquet, Path(folder, "triple.parquet"))
        peak_of_triple = _measure_memory(_command(triple, tokenizer_path, prefix, workers))
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return asdict(
        PreparationMeasurement(
            workers=workers,
            repeats=repeats,
            tokens=int(rounds[-1]["tokens"]),
            text_bytes=int(rounds[-1]["text_bytes"]),
            prepare_tokens_per_second=median["prepare"],
            bare_tokens_per_second=median["bare"],
            ratio=median["prepare"] / median["bare"],
            command_seconds=median["command"],
            megatron_lm_seconds=median.get("megatron_lm"),
            peak_memory_bytes=peak,
            peak_memory_bytes_of_triple=peak_of_triple,
        )
    )


def _measure_round(
    source_parquet: Path, tokenizer_path: Path, folder: Path, workers: int, megatron_script: Path | None
) -> dict[str, float]:
    """Return tokens and text bytes, tokens per second of `prepare` and `bare`, and seconds of the commands.

    Raises:
        FileProblem: The script of Megatron-LM produced other tokens.
    """
    os.sync()  # so that this round does not wait for earlier writes
    prefix = folder / "tokens"
    preparation = prepare_token_files(
        [source_parquet],
        tokenizer_path=tokenizer_path,
        prefix=prefix,
        num_workers=workers,
        overwrite=True,
    )
    tokens = preparation.manifest.num_tokens
    measured = {
        "tokens": tokens,
        "text_bytes": preparation.manifest.text_bytes,
        "prepare": tokens / preparation.encoding_seconds,
        "bare": _measure_bare(source_parquet, tokenizer_path, workers),
        "command": _time_command(_command(source_parquet, tokenizer_path, prefix, workers)),
    }
    if megatron_script is not None:
        seconds, token_bytes = _run_script(megatron_script, _json_lines(folder), tokenizer_path, workers)
        measured["megatron_lm"] = seconds
        if token_bytes != prefix.with_suffix(".bin").stat().st_size:
            raise FileProblem(
                megatron_script, "produced other tokens from the same texts", "use another version"
            )
    return measured


def _json_lines(folder: Path) -> Path:
    return folder / "texts.jsonl"


def _measure_bare(source_parquet: Path, tokenizer_path: Path, num_processes: int) -> float:
    """Return the summed tokens per second of concurrent processes, each with a share of the documents."""
    library = BARE_LIBRARIES[next(iter(load_tokenizer(tokenizer_path).files))]
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
                library,
            ],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in range(num_processes)
    ]
    for process in processes:
        assert process.stdout is not None, "the process was started without a pipe for its output"
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None, "the process was started without a pipe for its input"
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
    """Return the command of `data prepare`. A new process excludes the memory of the modules loaded here."""
    arguments = ["data", "prepare", str(source), "--tokenizer", str(tokenizer_path), "--output", str(prefix)]
    return [sys.executable, "-m", "sas_megatron", *arguments, "--workers", str(workers), "--overwrite"]


def _time_command(command: list[str], **options: Any) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - start


def _find_megatron_script(checkout: Path) -> Path:
    script = checkout.resolve() / "tools" / "preprocess_data.py"
    if not script.is_file():
        raise FileProblem(script, "does not exist", "give a checkout of github.com/NVIDIA/Megatron-LM")
    return script


def _write_json_lines(source_parquet: Path, path: Path) -> None:
    """Write the texts in the only format that Megatron-LM's script reads."""
    with path.open("w", encoding="utf-8") as lines:
        for text in stream_documents([source_parquet]):
            lines.write(json.dumps({"text": text}) + "\n")


def _run_script(script: Path, json_lines: Path, tokenizer_path: Path, workers: int) -> tuple[float, int]:
    """Return the seconds of Megatron-LM's complete command, and the size of the tokens that it wrote."""
    prefix = json_lines.with_suffix("")
    files = ["--input", str(json_lines), "--output-prefix", str(prefix)]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer_path)]
    command = [sys.executable, str(script), *files, *tokenizer, "--workers", str(workers), "--append-eod"]
    # The checkout's copy of Megatron-core takes precedence over the installed one.
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
        raise RuntimeError(f"the measured command failed with exit status {process.returncode}: {command}")
    return peak


def _process_tree(process_id: int) -> list[int]:
    try:
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [process_id, *(pid for child in children for pid in _process_tree(int(child)))]


def _resident_bytes(process_id: int) -> int:
    try:
        for line in Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # the process has ended
    return 0
