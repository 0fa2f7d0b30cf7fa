"""A command that reads a damaged checkpoint offers another one in its own terms."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.checkpoint.manifest import DamagedCheckpoint
from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError
from sas_megatron.evaluation.model_source import find_model_source
from sas_megatron.training import entry
from tests import small_attentions as small
from tests.evaluation.trained_runs import TrainedRun, train_and_export
from tests.fork_server import run_command
from tests.selection import cases
from tests.small_data import SmallData


@pytest.fixture(scope="module")
def run(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run with checkpoints after steps 6 and 12."""
    return train_and_export(ranks, small_data, tmp_path_factory.mktemp("run"), small.GQA)


@pytest.fixture
def copied(run: TrainedRun, tmp_path: Path) -> Path:
    shutil.copytree(run.directory, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "iter_0000012"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "manifest": lambda path: (path / "manifest.json").unlink(),
    "config": lambda path: truncate(path / "config.yaml"),
    "folder": lambda path: shutil.rmtree(path) or path.write_text(""),  # type: ignore[func-returns-value]
    "tensors": lambda path: truncate(path / "__0_0.distcp"),
}


@pytest.mark.parametrize("damage", ["manifest", "config", "folder"])
def test_evaluation_and_generation_offer_their_option(copied: Path, damage: str) -> None:
    DAMAGE[damage](newest(copied))
    with pytest.raises(DamagedCheckpoint) as raised:
        find_model_source(copied)
    assert raised.value.remedy == "restore it from a copy, or use another checkpoint with --iteration 6"
    assert find_model_source(copied, iteration=6).checkpoint.name == "iter_0000006"
    with pytest.raises(DamagedCheckpoint) as raised:
        find_model_source(newest(copied))
    other = copied / "checkpoints" / "iter_0000006"
    assert raised.value.remedy == f"restore it from a copy, or name another checkpoint: {other}"
    truncate(other / "__0_0.distcp")
    with pytest.raises(DamagedCheckpoint, match=r"since the run has no other complete checkpoint$"):
        find_model_source(copied)


@pytest.mark.parametrize(
    ("command", "arguments"),
    cases([("generate", ("--prompt", "def")), ("evaluate", ())], default=[("generate", ("--prompt", "def"))]),
)
def test_damaged_tensors_are_reported_with_the_option(
    copied: Path, command: str, arguments: tuple[str, ...]
) -> None:
    DAMAGE["tensors"](newest(copied))
    done = run_command(command, copied, *arguments)
    assert done.returncode == 2
    assert re.search(
        r"is damaged: __0_0\.distcp has .*; restore .*, or use another checkpoint with --iteration 6\n$",
        done.stderr,
    )


@pytest.mark.parametrize("damage", ["config", "tensors"])
def test_export_and_import_offer_another_checkpoint(copied: Path, tmp_path: Path, damage: str) -> None:
    DAMAGE[damage](newest(copied))

    def remedy(command: str, *options: str) -> str:
        arguments = ["checkpoint", command, str(copied), "--output", str(tmp_path / command), *options]
        error = CliRunner().invoke(cli, arguments).exception
        return getattr(error, "remedy", repr(error))

    assert remedy("export") == "restore it from a copy, or use another checkpoint with --iteration 6"
    other = copied / "checkpoints" / "iter_0000006"
    assert remedy("import") == f"restore it from a copy, or name another checkpoint: {other}"
    assert remedy("export", "--iteration", "6") == "None"
    assert (tmp_path / "export" / "tokenizer.model").exists()


def test_a_run_that_starts_from_damaged_weights_offers_its_fields(
    small_data: SmallData, copied: Path, tmp_path: Path, run: TrainedRun
) -> None:
    from sas_megatron.config.loading import load_run_config

    DAMAGE["config"](newest(copied))
    other = copied / "checkpoints" / "iter_0000006"
    trunk = load_run_config(run.directory / "config.yaml")
    for field, offered in (("initial_weights", "set checkpoint."), ("branch_from", "branch from another")):
        config = trunk.replaced(
            {"logging.run_directory": str(tmp_path / "new"), f"checkpoint.{field}": str(newest(copied))}
        )
        with pytest.raises(DamagedCheckpoint) as raised:
            entry.check_run(config, world_size=1)
        assert raised.value.remedy.startswith(f"restore it from a copy, or {offered}")
        assert raised.value.remedy.endswith(f"checkpoint.{field}={other}")


def test_a_model_with_more_rows_than_tokens_is_exported_and_used(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    """The tokenizer has 512 tokens; the rows 512 to 519 are never trained."""
    from tests.training.test_runs import complete

    config = small_data.run(
        tmp_path / "run",
        model={"vocab_size": 520},
        attention={"kind": "sas", "num_heads": 4, "head_dim": 12, "head_expansion": 2},
        training={"num_steps": 4},
        evaluation={"interval": None},
    )
    ranks(1).run(complete, config)
    assert find_model_source(tmp_path / "run").config.model.vocab_size == 520
    done = CliRunner().invoke(
        cli, ["checkpoint", "export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]
    )
    assert done.exit_code == 0, done.exception
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert (model.config.vocab_size, tokenizer.vocab_size) == (520, 512)
    prompt = tokenizer("def", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0]).startswith("def")
    assert tokenizer.decode([*prompt.input_ids[0].tolist(), 519]) == "def"
    done = CliRunner().invoke(
        cli, ["checkpoint", "import", str(tmp_path / "model"), "--output", str(tmp_path / "weights")]
    )
    assert done.exit_code == 0, done.exception


def test_evaluation_and_export_refuse_the_same_tokenizers(
    copied: Path, small_data: SmallData, tmp_path: Path
) -> None:
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.tokenizer_training import train_tokenizer

    (tmp_path / "text.txt").write_text(Path(__file__).read_text() * 5)
    for vocab_size, message in (
        (400, "differs from the tokenizer of the training run"),
        (600, "has 600 tokens"),
    ):
        other = tmp_path / f"{vocab_size}.model"
        train_tokenizer(stream_documents([tmp_path / "text.txt"]), vocab_size=vocab_size, model_path=other)
        with pytest.raises(FieldError, match=message):
            find_model_source(copied, overrides=[f"data.tokenizer={other}"])
        options = ["--output", str(tmp_path / "model"), "--tokenizer", str(other)]
        done = CliRunner().invoke(cli, ["checkpoint", "export", str(copied), *options])
        assert message in str(done.exception)
        assert not (tmp_path / "model").exists()
