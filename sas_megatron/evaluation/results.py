"""The files that evaluations of a checkpoint leave, by default in the run's directory.

evaluation/iter_0001000/summary.json   a section for each kind of evaluation: validation, files, tasks
                        results_*.json, samples_*.jsonl   as lm-evaluation-harness writes them
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.evaluation.start import FoundModel, run_directory_of
from sas_megatron.io.files import make_folder, save_file

SUMMARY = "summary.json"
# 1 did not say which weights were evaluated.
SCHEMA = 2


def results_folder(found: FoundModel, output: Path | None) -> Path:
    """Of a checkpoint within `output`, by default `evaluation` in the run's directory."""
    return (output or run_directory_of(found.checkpoint) / "evaluation") / found.checkpoint.resolve().name


def check_results(folder: Path, found: FoundModel) -> None:
    """Finds before anything is computed what would keep its results from being written; makes the folder.

    Raises:
        FileProblem: the folder cannot be written, or what is there cannot be read or is of other weights.
    """
    _read_summary(folder, found)
    with translate_os_errors(folder, problem="cannot be written", remedy="name a folder with --output"):
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_results(folder: Path, found: FoundModel, section: str, results: dict[str, Any]) -> Path:
    """Puts the results of one kind of evaluation into the summary, in place of earlier ones of this kind.

    Raises:
        FileProblem: as `check_results` does.
    """
    path = folder / SUMMARY
    summary = _read_summary(folder, found) | {
        "schema": SCHEMA,
        "checkpoint": str(found.checkpoint.resolve()),
        "manifest_sha256": found.manifest_sha256,
        "attention": found.config.attention.kind,
        section: {
            "evaluated_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parallel": found.config.parallel.model_dump(exclude_defaults=True),
            **results,
        },
    }
    save_file(path, json.dumps(summary, indent=2) + "\n", remedy="name a folder with --output")
    return path


def _read_summary(folder: Path, found: FoundModel) -> dict[str, Any]:
    """Earlier results of the same checkpoint, wherever it lies now; empty where there are none."""
    path = folder / SUMMARY
    try:
        summary = dict(json.loads(path.read_text(encoding="utf-8")))
        if summary["schema"] != SCHEMA:
            problem = f"has schema {summary['schema']}, and this program writes {SCHEMA}"
        elif summary["manifest_sha256"] != found.manifest_sha256:
            problem = f"has results of other weights than those in {found.checkpoint}"
        else:
            return summary
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is no summary of evaluations ({error!r})"
    raise FileProblem(path, problem, "take it away, or name another folder with --output")


def describe_loss(held_out: HeldOutLoss) -> dict[str, Any]:
    """As the files have it; bits per byte are null where the tokens stand for no text."""
    return {
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte if held_out.num_bytes else None,
        "num_tokens": held_out.num_tokens,
        "num_bytes": held_out.num_bytes,
    }
