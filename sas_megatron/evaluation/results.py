"""The files that evaluations of a checkpoint write, by default in the run directory.

evaluation/iter_0001000/summary.json   one section per kind of evaluation: validation, files, tasks
                        results_*.json, samples_*.jsonl   files of lm-evaluation-harness
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from sas_megatron.checkpoint.trained_run import find_run_directory
from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.evaluation.model_source import ModelSource
from sas_megatron.io.files import make_folder, save_file

SUMMARY = "summary.json"
# Schema 1 did not record which weights were evaluated.
SCHEMA = 2


def results_folder(source: ModelSource, output: Path | None) -> Path:
    """Return the folder for the results of a checkpoint.

    Args:
        source: The checkpoint.
        output: Parent folder; None selects `evaluation` in the run directory.
    """
    return (output or find_run_directory(source.checkpoint) / "evaluation") / source.checkpoint.resolve().name


def check_results(folder: Path, source: ModelSource) -> None:
    """Create the folder and check, before an evaluation, that its results can be written there.

    Raises:
        FileProblem: The folder cannot be written, or its summary cannot be read or belongs to other weights.
    """
    _read_summary(folder, source)
    with translate_os_errors(folder, problem="cannot be written", remedy="name a folder with --output"):
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_results(folder: Path, source: ModelSource, section: str, results: dict[str, Any]) -> Path:
    """Write one kind of results to the summary, replacing earlier results of this kind.

    Args:
        folder: Folder of the results.
        source: The evaluated checkpoint.
        section: Kind of evaluation: validation, files or tasks.
        results: The results.

    Returns:
        The path of the summary.

    Raises:
        FileProblem: The summary cannot be written, cannot be read, or belongs to other weights.
    """
    path = folder / SUMMARY
    summary = _read_summary(folder, source) | {
        "schema": SCHEMA,
        "checkpoint": str(source.checkpoint.resolve()),
        "manifest_sha256": source.manifest_sha256,
        "attention": source.config.attention.kind,
        section: {
            "evaluated_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parallel": source.config.parallel.model_dump(exclude_defaults=True),
            **results,
        },
    }
    save_file(path, json.dumps(summary, indent=2) + "\n", remedy="name a folder with --output")
    return path


def _read_summary(folder: Path, source: ModelSource) -> dict[str, Any]:
    """Return earlier results of the same weights, even if their checkpoint was moved; empty without any."""
    path = folder / SUMMARY
    try:
        summary = dict(json.loads(path.read_text(encoding="utf-8")))
        if summary["schema"] != SCHEMA:
            problem = f"has schema {summary['schema']}, but this version writes {SCHEMA}"
        elif summary["manifest_sha256"] != source.manifest_sha256:
            problem = f"contains results of other weights than {source.checkpoint}"
        else:
            return summary
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a summary of evaluations ({error!r})"
    raise FileProblem(path, problem, "remove it, or name another folder with --output")


def describe_loss(held_out: HeldOutLoss) -> dict[str, Any]:
    """Return a loss as the summary stores it. Bits per byte are null if the tokens have no text."""
    return {
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte if held_out.num_bytes else None,
        "num_tokens": held_out.num_tokens,
        "num_bytes": held_out.num_bytes,
    }
