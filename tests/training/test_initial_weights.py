"""From one run to the next by the commands: trained, exported, imported, continued as SAS."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sas_megatron.checkpoint.manifest import find_checkpoints
from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.training import start
from tests.small_data import SmallData
from tests.tolerances import BFLOAT16_LOSS, LOSS_AFTER_FIVE_STEPS
from tests.training.test_runs import complete, records

MHA = {"kind": "mha", "num_heads": 4, "head_dim": 12}
SAS = {**MHA, "kind": "sas", "head_expansion": 2, "initialization": "identity"}
# What a model that has learnt nothing loses.
UNTRAINED = math.log(512)


def checkpoint_command(*arguments: str) -> str:
    """On a rank, which has Megatron-core imported already: what `sas-megatron checkpoint` prints."""
    from sas_megatron.cli.main import cli

    done = CliRunner().invoke(cli, ["checkpoint", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


class Continued:
    """A trained multi-head run, and two folders of whole weights made of it by the commands."""

    def __init__(self, ranks: Any, small_data: SmallData, folder: Path) -> None:
        self.ranks, self.data, self.folder = ranks, small_data, folder
        training = {"num_steps": 40, "micro_batch_size": 8}
        base = self.of(MHA, "base", training=training, parallel={"tensor": 2})
        ranks(2).run(complete, base)
        self.sas_yaml = folder / "sas.yaml"
        self.sas_yaml.write_text(dump_yaml(self.of(SAS, "unused")), encoding="utf-8")
        self._command("export", folder / "base", "--output", folder / "exported")
        self._command("import", folder / "exported", "--output", folder / "mha")
        self._command("import", folder / "exported", "--output", folder / "sas", "--upcycle", self.sas_yaml)
        self._command("import", folder / "base", "--output", folder / "again", "--upcycle", self.sas_yaml)

    def of(self, attention: dict[str, Any], name: str, **sections: Any) -> RunConfig:
        """A run with another attention than the small data's own."""
        from sas_megatron.config.loading import build_run_config

        tree = self.data.run(self.folder / name, **sections).model_dump(mode="json")
        return build_run_config(tree | {"attention": attention})

    def _command(self, *arguments: object) -> None:
        (printed,) = self.ranks(1).run(checkpoint_command, *map(str, arguments), "--json")
        assert Path(json.loads(printed)["folder"]).is_dir()


@pytest.fixture(scope="module")
def continued(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    return Continued(ranks, small_data, tmp_path_factory.mktemp("continued"))


def test_a_checkpoint_and_its_export_are_the_same_weights(continued: Continued) -> None:
    digests = [
        json.loads((continued.folder / name / "weights.json").read_text())["weights_sha256"]
        for name in ("sas", "again")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["export", "import"])
def test_a_damaged_checkpoint_goes_nowhere(
    continued: Continued, ranks: Any, tmp_path: Path, name: str
) -> None:
    shutil.copytree(continued.folder / "base", tmp_path / "base")
    (path,) = find_checkpoints(tmp_path / "base" / "checkpoints")
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(
        AssertionError, match=r"is damaged: __0_0\.distcp has contents that differ from what was written"
    ):
        ranks(1).run(checkpoint_command, name, str(tmp_path / "base"), "--output", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


ENGINES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor 2": {"parallel": {"tensor": 2}},
    "bfloat16, distributed optimizer": {
        "training": {"precision": "bfloat16"},
        "optimizer": {"distributed": True},
    },
    "DeepSpeed, stage 3": {"training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": 3}},
}


def first_steps(continued: Continued, ranks: Any, attention: str, engine: str) -> list[float]:
    """Losses of three steps too small to learn anything."""
    sections = ENGINES[engine]
    config = continued.of(
        {"mha": MHA, "sas": SAS}[attention],
        f"{attention} {engine}",
        **{
            **sections,
            "training": {"num_steps": 4, **sections.get("training", {})},
            "optimizer": {"learning_rate": 1e-7, **sections.get("optimizer", {})},
            "evaluation": {"num_sequences": 8},
            "checkpoint": {"initial_weights": str(continued.folder / attention)},
        },
    )
    ranks(1 if engine == "one rank" else 2).run(complete, config)
    return [record["train_loss"] for record in records(config)]


@pytest.mark.parametrize("engine", ENGINES)
def test_sas_starts_where_its_base_ended(continued: Continued, ranks: Any, engine: str) -> None:
    base = first_steps(continued, ranks, "mha", "one rank" if engine == "tensor 2" else engine)
    losses = first_steps(continued, ranks, "sas", engine)
    assert len(losses) == len(base) == 4
    assert max(base) < UNTRAINED - 0.8, "the base has learnt something"
    tolerance = BFLOAT16_LOSS if engine.startswith("bfloat16") else LOSS_AFTER_FIVE_STEPS
    # After the first step, what the optimizer updates is in the weights.
    for index in range(4):
        assert losses[index] == pytest.approx(base[index], abs=tolerance), f"step {index + 1}"


def test_a_run_that_goes_on_does_not_ask_for_them_again(
    continued: Continued, ranks: Any, tmp_path: Path
) -> None:
    shutil.copytree(continued.folder / "sas", tmp_path / "weights")
    sections: dict[str, Any] = {
        "evaluation": {"num_sequences": 8},
        "checkpoint": {"initial_weights": str(tmp_path / "weights"), "resume": True},
    }
    whole = continued.of(SAS, "whole", training={"num_steps": 4}, **sections)
    ranks(1).run(complete, whole)
    stopped = continued.of(SAS, "goes on", training={"num_steps": 4, "stop_after_steps": 2}, **sections)
    ranks(1).run(complete, stopped)
    shutil.rmtree(tmp_path / "weights")
    config = continued.of(SAS, "goes on", training={"num_steps": 4}, **sections)
    ranks(1).run(complete, config)
    losses = [record["train_loss"] for record in records(config)]
    assert losses == [record["train_loss"] for record in records(whole)]
    assert len(losses) == 4
    assert min(losses) < UNTRAINED - 0.8
    # Nor does its record forget them.
    told = json.loads((continued.folder / "goes on" / "run.json").read_text())
    weights = json.loads((continued.folder / "sas" / "weights.json").read_text())
    assert told["initial_weights"] == {
        "folder": str(tmp_path / "weights"),
        "origin": str(continued.folder / "exported"),
        "weights_sha256": weights["weights_sha256"],
    }
    assert [session["initial_weights"] for session in told["sessions"]] == [told["initial_weights"], None]


def test_a_run_tells_which_checkpoint_it_began_with(continued: Continued, ranks: Any) -> None:
    base = continued.folder / "base"
    config = continued.of(MHA, "begun", training={"num_steps": 4}, checkpoint={"initial_weights": str(base)})
    ranks(1).run(complete, config)
    (newest,) = find_checkpoints(base / "checkpoints")
    assert json.loads((continued.folder / "begun" / "run.json").read_text())["initial_weights"] == {
        "folder": str(newest),
        "step": 40,
        "manifest_sha256": (newest / "manifest.sha256").read_text().split()[0],
    }


def test_weights_of_another_model_are_found_out_before_anything_starts(continued: Continued) -> None:
    config = continued.of(SAS, "refused", checkpoint={"initial_weights": str(continued.folder / "mha")})
    with pytest.raises(FieldError, match=r"attention.kind=sas: must be mha, as for .*; set attention"):
        start.check(config, world_size=1)


@torch.no_grad()
def test_the_exported_model_loses_what_the_run_did(
    continued: Continued, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    summary = json.loads((continued.folder / "base" / "summary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(continued.folder / "exported")
    (windows,) = ranks(1).run(validation_windows, continued.of(MHA, "base"))
    tokens = torch.tensor(windows)
    losses = [model(row[None, :-1]).logits[0].float() for row in tokens]
    found = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits, row[1:])
            for logits, row in zip(losses, tokens, strict=True)
        ]
    ).mean()
    assert found.item() == pytest.approx(summary["final_validation_loss"], abs=LOSS_AFTER_FIVE_STEPS)


def validation_windows(config: RunConfig) -> list[list[int]]:
    """On a rank."""
    from sas_megatron.data.batches import build_validation_samples
    from sas_megatron.data.tokenizer import Tokenizer

    samples = build_validation_samples(
        config.data, Tokenizer(config.data.tokenizer), num_samples=config.evaluation.num_sequences
    )
    rows = (samples[index] for index in range(config.evaluation.num_sequences))
    return [[*row["tokens"].tolist(), int(row["labels"][-1])] for row in rows]
