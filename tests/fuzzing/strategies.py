"""The fuzz targets by name, each with the strategy that damages its files."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.fuzzing import data_targets, targets
from tests.fuzzing.child import Seeds, Target
from tests.fuzzing.inputs import Entry, Files, Folder, Input, Link
from tests.fuzzing.mutations import (
    damaged,
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_yaml,
)

Strategy = st.SearchStrategy[Input]


@dataclass(frozen=True)
class FuzzTarget:
    """A target and its inputs.

    Attributes:
        target: What reads the files.
        inputs: Returns the strategy of damaged files for the seeds.
    """

    target: Target
    inputs: Callable[[Seeds], Strategy]


def _damage_of(path: str, content: bytes) -> st.SearchStrategy[bytes]:
    """Return the damage that suits a file by its ending."""
    if path.endswith((".yaml", ".yml")):
        return damaged(content, damaged_yaml)
    if path.endswith(".json"):
        return damaged(content, damaged_json)
    if path.endswith((".jsonl", ".ndjson")):
        return damaged(content, damaged_lines)
    if path.endswith(".safetensors"):
        return damaged(content, _damaged_safetensors)
    if path.endswith(".gz"):
        inner = gzip.decompress(content)
        return st.one_of(damaged_bytes(content), _damage_of(path[:-3], inner).map(gzip.compress))
    return damaged_bytes(content)


def _damaged_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Damage the JSON header and keep its stated length right."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    return damaged_json(header).map(lambda text: len(text).to_bytes(8, "little") + text + tensors)


@st.composite
def _folders(
    draw: st.DrawFn,
    seeds: Seeds,
    *,
    paths: Callable[[str], bool] = lambda _path: True,
    arguments: st.SearchStrategy[tuple[str, ...]] = st.just(()),  # noqa: B008
    seal: Callable[[Files, dict[str, Entry]], dict[str, Entry]] | None = None,
) -> Input:
    """Damage one or two files of a seed.

    Args:
        draw: Draws values.
        seeds: The files of each seed.
        paths: Selects the files to damage.
        arguments: The arguments.
        seal: Adds changes of recorded checksums to the changes. It is used in half of the inputs, so that
            damage is also read which the checksums would find.
    """
    name = draw(st.sampled_from(sorted(seeds)))
    files = seeds[name]
    choices = sorted(filter(paths, files))
    changes: dict[str, Entry] = {}
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        path = draw(st.sampled_from(choices))
        kind = draw(st.integers(0, 39))
        if kind > 3:
            changes[path] = draw(_damage_of(path, files[path]))
        else:
            changes[path] = (None, Folder(), Link("missing"), b"")[kind]
    if seal is not None and draw(st.booleans()):
        changes = seal(files, changes)
    return Input(name, changes, draw(arguments))


def _seal_tokens(files: Files, changes: dict[str, Entry]) -> dict[str, Entry]:
    """Record the sizes and checksums of damaged token files in their manifest."""
    try:
        manifest = json.loads(changes.get("text.json", files["text.json"]))
        for ending in ("bin", "idx"):
            content = changes.get(f"text.{ending}", files[f"text.{ending}"])
            if isinstance(content, bytes):
                manifest[f"{ending}_bytes"] = len(content)
                manifest[f"{ending}_sha256"] = hashlib.sha256(content).hexdigest()
        return {**changes, "text.json": json.dumps(manifest).encode("utf-8", "surrogatepass")}
    except (TypeError, ValueError, RecursionError):
        return changes


def _seal_checkpoint(files: Files, changes: dict[str, Entry]) -> dict[str, Entry]:
    """Record the sizes and checksums of a checkpoint's damaged files in its manifest, and the manifest's."""
    folder = "run/checkpoints/iter_0000002/"
    content = changes.get(f"{folder}manifest.json", files[f"{folder}manifest.json"])
    if not isinstance(content, bytes):
        return changes
    try:
        manifest = json.loads(content)
        for path, entry in changes.items():
            name = path.removeprefix(folder)
            if isinstance(entry, bytes) and name in manifest["files"]:
                manifest["files"][name] = {
                    "size_bytes": len(entry),
                    "sha256": hashlib.sha256(entry).hexdigest(),
                }
        if f"{folder}manifest.json" not in changes:
            content = json.dumps(manifest).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, KeyError, RecursionError):
        pass
    checksum = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()
    return {**changes, f"{folder}manifest.json": content, f"{folder}manifest.sha256": checksum}


def _overrides(seeds: Seeds) -> Strategy:
    fields = st.sampled_from(targets.CONFIG_FIELDS)
    values = st.sampled_from(targets.OVERRIDE_VALUES)
    override = st.one_of(
        st.builds("{}={}".format, fields, values),
        st.builds("{}={}".format, st.text(max_size=8), st.text(max_size=8)),
        st.text(max_size=12),
    ).map(lambda text: text.replace("\0", "0"))  # an argument of a process has no NUL
    # Most configs are read with few overrides, or hardly any would be accepted.
    overrides = st.sampled_from((0, 0, 0, 0, 1, 2)).flatmap(
        lambda number: st.lists(override, min_size=number, max_size=number)
    )
    options = st.sampled_from(((), ("--json",), ("--terms",)))
    arguments = st.builds(lambda some, more: (*some, "--", "config.yaml", *more), options, overrides)
    return _folders(seeds, arguments=arguments)


TARGETS = {
    "configs": FuzzTarget(targets.CONFIGS, _overrides),
    "studies": FuzzTarget(targets.STUDIES, _folders),
    "documents": FuzzTarget(
        data_targets.DOCUMENTS,
        lambda seeds: _folders(
            seeds, arguments=st.sampled_from(((), (), ("meta.text",), ("meta",), ("id",), ("meta.n.text",)))
        ),
    ),
    "tokens": FuzzTarget(
        data_targets.TOKENS,
        lambda seeds: _folders(
            seeds,
            paths=lambda path: path.startswith("text."),
            seal=_seal_tokens,
            arguments=st.sampled_from(((), ("--verify",), ("--verify", "--document=3"))),
        ),
    ),
    "tokenizers": FuzzTarget(data_targets.TOKENIZERS, _folders),
    "models": FuzzTarget(targets.MODELS, _folders),
    "tables": FuzzTarget(targets.TABLES, _folders),
    "hardware": FuzzTarget(targets.HARDWARE, _folders),
    "runs": FuzzTarget(
        targets.RUNS,
        lambda seeds: _folders(seeds, paths=lambda path: path.startswith("run/") and "iter" not in path),
    ),
    "checkpoints": FuzzTarget(
        targets.CHECKPOINTS,
        lambda seeds: _folders(seeds, paths=lambda path: "iter_" in path, seal=_seal_checkpoint),
    ),
}
