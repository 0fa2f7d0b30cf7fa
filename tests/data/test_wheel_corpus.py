"""A corpus of the Python source in wheels: pinned, without duplicates, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.data import wheel_corpus
from sas_megatron.data.near_duplicates import NearDuplicates, compute_signature, estimate_jaccard
from sas_megatron.data.wheel_corpus import build_wheel_corpus, read_wheel_list
from tests.conftest import ROOT


def words(count: int, *, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(10**9)}" for _ in range(count)]


def source(*, seed: int) -> str:
    return "\n".join(" ".join(words(8, seed=1000 * seed + line)) for line in range(40)) + "\n"


def write_wheels(folder: Path, **projects: dict[str, str | bytes]) -> Path:
    """Write a wheel for each project, and the list of them; return the list."""
    folder.mkdir(exist_ok=True)
    lines = ["# projects"]
    for name, files in projects.items():
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        lines.append(f"{name}==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return folder / "list.txt"


@pytest.mark.parametrize("shared", [0, 300, 700, 1000])
def test_signatures_estimate_the_jaccard_index_of_shingles(shared: int) -> None:
    common, ours, theirs = words(shared, seed=1), words(1000 - shared, seed=2), words(1000 - shared, seed=3)
    one, other = " ".join(common + ours), " ".join(common + theirs)
    sets = [
        {tuple(found[start : start + 5]) for start in range(len(found) - 4)}
        for found in (one.split(), other.split())
    ]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    estimate = estimate_jaccard(compute_signature(one), compute_signature(other))
    # Three deviations of a mean of 128 values.
    assert abs(estimate - jaccard) <= 3 * (jaccard * (1 - jaccard) / 128) ** 0.5


def test_only_the_first_of_near_duplicates_is_kept() -> None:
    near = NearDuplicates()
    text = source(seed=1)
    assert near.add(text)
    assert not near.add(text.replace(text.split()[7], "renamed"))
    assert near.add(source(seed=2))
    half = text.splitlines()[:20] + source(seed=3).splitlines()[:20]
    assert near.add("\n".join(half)), "half of it is new"
    assert near.add("")


def test_corpus_has_the_source_of_all_wheels_without_duplicates(tmp_path: Path) -> None:
    text = source(seed=1)
    first = {
        "a/x.py": text,
        "a/empty.py": " ",
        "a/latin.py": b"# \xe9",
        "a/wide.py": "x" * 1001,
        "a/y.txt": "no",
    }
    second = {
        "b/copy.py": text.replace("\n", "  \r\n"),
        "b/near.py": text + "more = 1\n",
        "b/z.py": source(seed=2),
    }
    list_path = write_wheels(tmp_path / "wheels", one=first, two=second)
    done = CliRunner().invoke(
        cli,
        [
            *("data", "wheels", str(list_path), "--output", str(tmp_path / "text.parquet")),
            "--wheels",
            str(list_path.parent),
        ],
    )
    assert done.exit_code == 0, done.exception
    table = pq.read_table(tmp_path / "text.parquet").to_pydict()
    assert set(table["path"]) in (
        {"one/a/x.py", "two/b/z.py"},
        {"two/b/copy.py", "two/b/z.py"},
        {"two/b/near.py", "two/b/z.py"},
    )
    record = json.loads((tmp_path / "text.json").read_text())
    kinds = ("empty files", "files that are not UTF-8", "files with a line over 1,000 characters")
    assert [record["left_out"][kind] for kind in kinds] == [1, 1, 1]
    # The copy is an exact duplicate if the original comes first in the order of a hash.
    assert sum(record["left_out"].values()) == 5
    assert record["sha256"] in done.output
    # The same list gives the same documents, in the order of a hash.
    again = build_wheel_corpus(list_path, tmp_path / "again.parquet", wheel_folder=list_path.parent)
    assert again.sha256 == record["sha256"]
    with pytest.raises(UserError, match=rf"--sha256=00: is not the hash of the documents, {again.sha256}"):
        build_wheel_corpus(
            list_path, tmp_path / "none.parquet", wheel_folder=list_path.parent, expected_sha256="00"
        )
    assert not (tmp_path / "none.parquet").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no wheels"),
        ("x==1\n", r"list\.txt:1: is not NAME==VERSION --hash=sha256:HEX; pin one wheel"),
        (2 * f"x==1 --hash=sha256:{64 * '0'}\n", r"list\.txt:2: repeats x, whose versions have much text in"),
    ],
)
def test_an_invalid_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_wheel_list(tmp_path / "list.txt")


def test_missing_and_damaged_wheels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Done:
        returncode, stderr = 1, "WARNING: x\nERROR: No matching distribution found for one==1.0\n"

    monkeypatch.setattr(wheel_corpus.subprocess, "run", lambda command, **_: calls.append(command) or Done)
    list_path = write_wheels(tmp_path / "wheels", one={"x.py": "x"})
    with pytest.raises(
        UserError, match=r"pip download failed \(ERROR: No matching distribution found for one==1"
    ):
        build_wheel_corpus(list_path, tmp_path / "out.parquet", wheel_folder=tmp_path / "elsewhere")
    assert "--require-hashes" in calls[0]
    damaged = tmp_path / "wheels" / "one-1.0-py3-none-any.whl"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    digest = hashlib.sha256(damaged.read_bytes()).hexdigest()
    list_path.write_text(f"one==1.0 --hash=sha256:{digest}\n")
    with pytest.raises(UserError, match=r"one-1.0-py3-none-any.whl: cannot be read \(.*; remove it, and"):
        build_wheel_corpus(list_path, tmp_path / "out.parquet", wheel_folder=damaged.parent)


def test_shipped_list_pins_one_version_of_each_project() -> None:
    wheels = read_wheel_list(ROOT / "configs" / "studies" / "scale" / "wheels.txt")
    assert len(wheels) == 50
