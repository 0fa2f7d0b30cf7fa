"""Initial weights through the commands: a run is trained, exported, imported, and converted as SAS."""

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
from sas_megatron.training import entry
from tests.small_data import SmallData
from tests.tolerances import BFLOAT16_LOSS, LOSS_AFTER_FIVE_STEPS
from tests.training.test_runs import complete, records

MHA = {"kind": "mha", "num_heads": 4, "head_dim": 12}
SAS = {**MHA, "kind": "sas", "head_expansion": 2, "initialization": "identity"}
# The loss of uniform predictions.
UNTRAINED = math.log(512)


def checkpoint_command(*arguments: str) -> str:
    """Run `sas-megatron checkpoint` on a rank, where Megatron-core is imported already; return its output."""
    from sas_megatron.cli.main import cli

    done = CliRunner().invoke(cli, ["checkpoint", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


class ConvertedRun:
    """A trained multi-head run, and folders of unsharded weights that the commands converted it into."""

    def __init__(self, ranks: Any, small_data: SmallData, folder: Path) -> None:
        self.ranks, self.data, self.folder = ranks, small_data, folder
        training = {"num_steps": 40, "micro_batch_size": 8}
        base = self.config(MHA, "base", training=training, parallel={"tensor": 2})
        ranks(2).run(complete, base)
        self.sas_yaml = folder / "sas.yaml"
        self.sas_yaml.write_text(dump_yaml(self.config(SAS, "unused")), encoding="utf-8")
        self._command("export", folder / "base", "--output", folder / "exported")
        self._command("import", folder / "exported", "--output", folder / "mha")
        self._command("import", folder / "exported", "--output", folder / "sas", "--upcycle", self.sas_yaml)
        self._command(
            "import", folder / "base", "--output", folder / "sas_directly", "--upcycle", self.sas_yaml
        )

    def config(self, attention: dict[str, Any], name: str, **sections: Any) -> RunConfig:
        """Return a run with the given attention section."""
        from sas_megatron.config.loading import build_run_config

        tree = self.data.run(self.folder / name, **sections).model_dump(mode="json")
        return build_run_config(tree | {"attention": attention})

    def _command(self, *arguments: object) -> None:
        (printed,) = self.ranks(1).run(checkpoint_command, *map(str, arguments), "--json")
        assert Path(json.loads(printed)["folder"]).is_dir()


@pytest.fixture(scope="module")
def converted(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> ConvertedRun:
    return ConvertedRun(ranks, small_data, tmp_path_factory.mktemp("converted"))


def test_a_checkpoint_and_its_export_contain_the_same_weights(converted: ConvertedRun) -> None:
    digests = [
        json.loads((converted.folder / name / "weights.json").read_text())["weights_sha256"]
        for name in ("sas", "sas_directly")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["export", "import"])
def test_a_damaged_checkpoint_is_neither_exported_nor_imported(
    converted: ConvertedRun, ranks: Any, tmp_path: Path, name: str
) -> None:
    shutil.copytree(converted.folder / "base", tmp_path / "base")
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


def first_steps(converted: ConvertedRun, ranks: Any, attention: str, engine: str) -> list[float]:
    """Return the losses of four steps with a learning rate at which the loss hardly changes."""
    sections = ENGINES[engine]
    config = converted.config(
        {"mha": MHA, "sas": SAS}[attention],
        f"{attention} {engine}",
        **{
            **sections,
            "training": {"num_steps": 4, **sections.get("training", {})},
            "optimizer": {"learning_rate": 1e-7, **sections.get("optimizer", {})},
            "evaluation": {"num_sequences": 8},
            "checkpoint": {"initial_weights": str(converted.folder / attention)},
        },
    )
    ranks(1 if engine == "one rank" else 2).run(complete, config)
    return [record["train_loss"] for record in records(config)]


@pytest.mark.parametrize("engine", ENGINES)
def test_sas_starts_with_the_loss_of_the_base(converted: ConvertedRun, ranks: Any, engine: str) -> None:
    base = first_steps(converted, ranks, "mha", "one rank" if engine == "tensor 2" else engine)
    losses = first_steps(converted, ranks, "sas", engine)
    assert len(losses) == len(base) == 4
    assert max(base) < UNTRAINED - 0.8, "the base must have learnt something"
    tolerance = BFLOAT16_LOSS if engine.startswith("bfloat16") else LOSS_AFTER_FIVE_STEPS
    # From the second step on, the weights come from the optimizer's state.
    for index in range(4):
        assert losses[index] == pytest.approx(base[index], abs=tolerance), f"step {index + 1}"


def test_a_resumed_run_does_not_read_the_initial_weights_again(
    converted: ConvertedRun, ranks: Any, tmp_path: Path
) -> None:
    shutil.copytree(converted.folder / "sas", tmp_path / "weights")
    sections: dict[str, Any] = {
        "evaluation": {"num_sequences": 8},
        "checkpoint": {"initial_weights": str(tmp_path / "weights"), "resume": True},
    }
    uninterrupted = converted.config(SAS, "uninterrupted", training={"num_steps": 4}, **sections)
    ranks(1).run(complete, uninterrupted)
    stopped = converted.config(SAS, "resumed", training={"num_steps": 4, "stop_after_steps": 2}, **sections)
    ranks(1).run(complete, stopped)
    shutil.rmtree(tmp_path / "weights")
    config = converted.config(SAS, "resumed", training={"num_steps": 4}, **sections)
    ranks(1).run(complete, config)
    losses = [record["train_loss"] for record in records(config)]
    assert losses == [record["train_loss"] for record in records(uninterrupted)]
    assert len(losses) == 4
    assert min(losses) < UNTRAINED - 0.8
    # The provenance of a resumed run still contains them.
    provenance = json.loads((converted.folder / "resumed" / "run.json").read_text())
    weights = json.loads((converted.folder / "sas" / "weights.json").read_text())
    assert provenance["initial_weights"] == {
        "folder": str(tmp_path / "weights"),
        "origin": str(converted.folder / "exported"),
        "weights_sha256": weights["weights_sha256"],
    }
    assert [session["initial_weights"] for session in provenance["sessions"]] == [
        provenance["initial_weights"],
        None,
    ]


def test_run_json_names_the_checkpoint_of_the_initial_weights(converted: ConvertedRun, ranks: Any) -> None:
    base = converted.folder / "base"
    config = converted.config(
        MHA, "from_checkpoint", training={"num_steps": 4}, checkpoint={"initial_weights": str(base)}
    )
    ranks(1).run(complete, config)
    (newest,) = find_checkpoints(base / "checkpoints")
    assert json.loads((converted.folder / "from_checkpoint" / "run.json").read_text())["initial_weights"] == {
        "folder": str(newest),
        "step": 40,
        "manifest_sha256": (newest / "manifest.sha256").read_text().split()[0],
    }


def test_weights_of_another_model_are_refused_before_training(converted: ConvertedRun) -> None:
    config = converted.config(SAS, "refused", checkpoint={"initial_weights": str(converted.folder / "mha")})
    with pytest.raises(FieldError, match=r"attention.kind=sas: must be mha, as for .*; set attention"):
        entry.check_run(config, world_size=1)


@torch.no_grad()
def test_the_exported_model_has_the_validation_loss_of_the_run(
    converted: ConvertedRun, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    summary = json.loads((converted.folder / "base" / "summary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(converted.folder / "exported")
    (windows,) = ranks(1).run(validation_windows, converted.config(MHA, "base"))
    tokens = torch.tensor(windows)
    logits_by_window = [model(row[None, :-1]).logits[0].float() for row in tokens]
    loss = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits, row[1:])
            for logits, row in zip(logits_by_window, tokens, strict=True)
        ]
    ).mean()
    assert loss.item() == pytest.approx(summary["final_validation_loss"], abs=LOSS_AFTER_FIVE_STEPS)


def validation_windows(config: RunConfig) -> list[list[int]]:
    """Return, on a rank, the tokens of the validation windows."""
    from sas_megatron.data.batches import build_validation_samples
    from sas_megatron.data.tokenizer_loading import load_tokenizer

    samples = build_validation_samples(
        config.data, load_tokenizer(config.data.tokenizer), num_samples=config.evaluation.num_sequences
    )
    rows = (samples[index] for index in range(config.evaluation.num_sequences))
    return [[*row["tokens"].tolist(), int(row["labels"][-1])] for row in rows]
