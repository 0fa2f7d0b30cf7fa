"""Small tasks for lm-evaluation-harness, built from source code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import dump_tree

NUM_DOCUMENTS = 5
NAMES = ["next_line", "yes_or_no", "last_word", "whole_text", "line_end"]


def write_tasks(folder: Path, texts: list[str]) -> Path:
    """Write task files and their data: multiple choice, cloze, rolling log-likelihood and generation.

    The contexts have very different lengths; some exceed the context of small models.
    """
    folder.mkdir()
    lines = [line for text in texts for line in text.splitlines() if 20 < len(line) < 50]
    contexts = ["\n".join(lines[10 * n : 10 * n + 1 + n * n]) for n in range(NUM_DOCUMENTS)]
    answers = [lines[10 * n + 1 + n * n] for n in range(NUM_DOCUMENTS)]
    choices = [[answers[n], *lines[200 + 3 * n : 203 + 3 * n]] for n in range(NUM_DOCUMENTS)]
    documents: dict[str, list[dict[str, Any]]] = {
        "next_line": [
            {"context": context, "choices": of_context[1:] + of_context[:1], "answer": 3}
            for context, of_context in zip(contexts, choices, strict=True)
        ],
        "yes_or_no": [
            {"context": f"# {line}\n# is it code?", "answer": n % 2} for n, line in enumerate(answers)
        ],
        "last_word": [
            {"context": line.rsplit(" ", 1)[0], "answer": line.rsplit(" ", 1)[1]}
            for line in lines
            if " " in line.strip()
        ][:NUM_DOCUMENTS],
        "whole_text": [{"text": text[: 10 + 300 * n]} for n, text in enumerate(texts[:NUM_DOCUMENTS])],
        "line_end": [
            {"context": f"{context}\n{answer[:10]}", "answer": answer[10:]}
            for context, answer in zip(contexts, answers, strict=True)
        ],
    }
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}"}
    tasks: dict[str, dict[str, Any]] = {
        "next_line": {
            **choice,
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "\n",
            "num_fewshot": 1,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        # Continuations of one token, which share one input.
        "yes_or_no": {**choice, "doc_to_choice": ["y", "n"], "metric_list": [{"metric": "acc"}]},
        "last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "whole_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
        "line_end": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 9, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        fields = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "fewshot_split": "test",
            "metadata": {"version": 1},
            **task,
        }
        (folder / f"{name}.yaml").write_text(dump_tree(fields))
    return folder
