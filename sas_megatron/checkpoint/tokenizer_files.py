"""The tokenizer in the folder of an exported or imported model.

sentencepiece model   -> tokenizer.model, and code that transformers loads
tokenizer.json        -> tokenizer.json, without the special tokens that it would add to a text
encoding of tiktoken  -> tokenizer.tiktoken, and code that transformers loads
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from sas_megatron.checkpoint.trained_run import find_run_directory, select_checkpoint
from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import find_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_CODE = Path(__file__).parent / "remote_code"
# The code of the classes that read a file of a tokenizer; transformers reads tokenizer.json itself.
_CLASSES = {
    "tokenizer.model": ("tokenization_sas_megatron", "SASMegatronTokenizer"),
    "tokenizer.tiktoken": ("tokenization_tiktoken_sas_megatron", "SASMegatronTiktokenTokenizer"),
}
_SETTINGS = "tokenizer_config.json"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Write a tokenizer that transformers loads and that gives the ids of training.

    Raises:
        OSError: A file cannot be written.
    """
    settings: dict[str, Any] = json.loads(tokenizer.files.get(_SETTINGS, b"{}"))
    settings |= {
        "model_max_length": config.data.sequence_length,
        "eos_token": tokenizer.end_of_document,
        # The vocabulary has no padding token, so the end of document is used instead.
        "pad_token": tokenizer.end_of_document,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    name, content = next(iter(tokenizer.files.items()))
    if name in _CLASSES:
        module, class_name = _CLASSES[name]
        shutil.copyfile(_CODE / f"{module}.py", folder / f"{module}.py")
        settings["tokenizer_class"] = class_name
        settings["auto_map"] = {"AutoTokenizer": [f"{module}.{class_name}", None]}
    else:
        content = _without_added_tokens(content)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        for field in ("add_bos_token", "add_eos_token", "auto_map", "added_tokens_decoder"):
            settings.pop(field, None)
    (folder / name).write_bytes(content)
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def open_source_tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer in the folder of a model; None if there is none that this program reads.

    Args:
        source: The folder of a Hugging Face model, a run directory or a checkpoint.
    """
    folder = source
    if not (source / "config.json").exists():
        folder = find_run_directory(select_checkpoint(source, iteration=None))
    path = find_tokenizer(folder)
    if path is None:
        return None
    try:
        return load_tokenizer(path)
    except UserError as error:
        logger.warning("the tokenizer is not imported. %s", error)
        return None


def _without_added_tokens(content: bytes) -> bytes:
    """Return a tokenizer.json that adds no special tokens before or after a text, as in training."""
    fields = json.loads(content)
    if fields.get("post_processor") is None:
        return content
    return json.dumps(fields | {"post_processor": None}, ensure_ascii=False).encode()
