"""The validation data of a run: named sets of token files (`evaluation.sets`), or the validation split.

A set of prefixes that are also in `data.prefixes` has their validation documents, as `data.split` divides
them. A set of other prefixes has all their documents.
"""

from __future__ import annotations

import os
from pathlib import Path

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.token_files import open_token_files, token_file

# The name of the validation data of a run without named sets.
UNNAMED = "validation"
# No training documents, and all documents for validation.
ALL_DOCUMENTS = [0.0, 1.0]


def list_validation_sets(config: RunConfig) -> dict[str, DataConfig]:
    """Return the `data` section that describes each validation set, by name.

    Raises:
        FieldError: A set has both prefixes that are trained on and others.
    """
    sets = config.evaluation.sets
    if sets is None:
        return {UNNAMED: config.data}
    trained = {_real_path(prefix) for prefix in config.data.prefixes}
    cache = config.data.index_cache or str(Path(config.data.prefixes[0]).parent / "index_cache")
    found = {}
    for name, prefixes in sets.items():
        in_training = {_real_path(prefix) in trained for prefix in prefixes}
        if len(in_training) > 1:
            raise FieldError(
                f"evaluation.sets.{name}",
                prefixes,
                "has prefixes that are in data.prefixes, of which only validation documents belong to a set, "
                "and prefixes that are not",
                "divide it into two sets",
            )
        split = config.data.split if in_training == {True} else ALL_DOCUMENTS
        changes = {"prefixes": prefixes, "weights": None, "split": split, "index_cache": cache}
        found[name] = config.data.model_copy(update=changes)
    return found


def check_validation_sets(config: RunConfig, *, verify: bool) -> None:
    """Check the token files of named validation sets; `verify` as in `open_token_files`.

    Raises:
        UserError: As in `open_token_files`; the message names the set.
    """
    if config.evaluation.sets is None:
        return
    for name, data in list_validation_sets(config).items():
        try:
            open_token_files(data, vocab_size=config.model.vocab_size, verify=verify)
        except FieldError as error:
            rule = f"{error.field}={error.value}: {error.rule}"
            prefixes = config.evaluation.sets[name]
            raise FieldError(f"evaluation.sets.{name}", prefixes, rule, error.remedy) from None


def _real_path(prefix: str) -> str:
    return os.path.realpath(token_file(prefix, ".bin"))
