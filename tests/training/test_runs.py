"""Complete runs: the loss falls, a resumed run is bit-identical, and layouts do not change the losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.tensor_reading import TensorReader
from sas_megatron.config.attention import MODIFIERS
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.training.run_files import RunFiles
from tests.conftest import ROOT
from tests.rank_pool import in_layout
from tests.run_configs import SHIPPED
from tests.selection import cases
from tests.small_data import SmallData
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.training_runs import complete_with_callback


def complete(config: RunConfig) -> None:
    """Complete a run on this rank of the pool."""
    from sas_megatron.training.loop import Run

    Run(config, in_layout(config.parallel, seed=config.training.seed)).complete()


def records(config: RunConfig, kind: str = "train") -> list[dict[str, Any]]:
    lines = (Path(config.logging.run_directory) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def summary(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.logging.run_directory) / "summary.json").read_text())


def final_checkpoint(config: RunConfig) -> Path:
    last_step = config.training.stop_after_steps or config.training.num_steps
    return RunFiles.checkpoints(config) / f"iter_{last_step:07d}"


def final_tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of the last checkpoint: weights, optimizer states and each rank's random states."""
    reader = TensorReader(final_checkpoint(config))
    return {name: reader.read(name) for name in reader.shapes()}


def final_counts(config: RunConfig) -> dict[str, Any]:
    """Return the counts of the last checkpoint, without times."""
    progress = json.loads((final_checkpoint(config) / "progress.json").read_text())
    for timed in ("training_seconds", "step_seconds"):
        del progress["counts"][timed]
    return progress


def assert_same_final_state(actual: RunConfig, expected: RunConfig) -> None:
    """Compare weights, optimizer states, random states of each rank, and counts, bit for bit."""
    actual_tensors, tensors = final_tensors(actual), final_tensors(expected)
    assert {"random.cpu", "embedding.word_embeddings.weight"} < tensors.keys()
    assert actual_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(actual_tensors[name], tensor), f"{name} differs"
    assert final_counts(actual) == final_counts(expected)


QUICKSTARTS = [path.stem.removeprefix("quickstart_") for path in SHIPPED if "quickstart" in path.stem]


def test_every_kind_and_modifier_has_a_quickstart_config() -> None:
    paths = [ROOT / "configs" / f"quickstart_{name}.yaml" for name in QUICKSTARTS]
    attentions = [load_run_config(path).attention for path in paths]
    assert {attention.kind for attention in attentions} == set(KINDS)
    for name in MODIFIERS:
        choices = {getattr(attention, name) for attention in attentions}
        assert choices == ({"none", "headwise", "elementwise"} if name == "output_gate" else {False, True})


@pytest.mark.parametrize(
    ("kind", "num_steps"),
    cases([("sas", 40), *((kind, 120) for kind in QUICKSTARTS)], default=[("sas", 40)]),
)
def test_every_shipped_quickstart_config_learns_the_builtin_corpus(
    ranks: Any, small_data: SmallData, tmp_path: Path, kind: str, num_steps: int
) -> None:
    config = load_run_config(
        ROOT / "configs" / f"quickstart_{kind}.yaml",
        [
            f"data.prefixes=['{small_data.prefix}']",
            f"data.tokenizer='{small_data.tokenizer}'",
            "data.sequence_length=64",
            "data.split=[0.8, 0.2]",
            "model.vocab_size=512",
            "parallel.tensor=1",
            "schedule.warmup_steps=3",
            f"training.num_steps={num_steps}",
            # With few windows the loss would depend on their selection.
            "evaluation.num_sequences=32",
            f"logging.run_directory='{tmp_path / 'run'}'",
            "logging.interval=1",
        ],
    )
    ranks(1).run(complete, config)
    losses = [record["train_loss"] for record in records(config)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3), "the loss of uniform predictions"
    assert losses[-1] < losses[0] - 1.0
    held_out = records(config, "validation")
    assert [record["step"] for record in held_out] == list(range(10, num_steps + 10, 10))
    assert held_out[-1]["validation_loss"] < held_out[0]["validation_loss"] - 0.2


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor 2 with dropout": (
        2,
        {
            "parallel": {"tensor": 2, "sequence": True},
            "model": {"hidden_dropout": 0.1},
            "attention": {"dropout": 0.1},
        },
    ),
    "pipeline 2 interleaved, data 2, overlapped": (
        4,
        {
            "model": {"num_layers": 4, "tie_embeddings": True},
            "parallel": {
                "pipeline": 2,
                "virtual_pipeline": 2,
                "overlap_gradient_reduce": True,
                "overlap_parameter_gather": True,
            },
            "optimizer": {"distributed": True},
            "training": {"micro_batch_size": 2},
        },
    ),
    "data 2, bfloat16, distributed optimizer": (
        2,
        {"optimizer": {"distributed": True}, "training": {"precision": "bfloat16"}},
    ),
}


# Other tests of this folder resume one rank, and `test_step_profiler` two tensor ranks with dropout.
@pytest.mark.parametrize(
    "layout", cases(LAYOUTS, default=LAYOUTS.keys() - {"one rank", "tensor 2 with dropout"})
)
def test_three_steps_and_two_resumed_steps_equal_five_bit_for_bit(
    ranks: Any, small_data: SmallData, tmp_path: Path, layout: str
) -> None:
    world_size, sections = LAYOUTS[layout]

    def run(name: str, **more: dict[str, Any]) -> RunConfig:
        merged = {
            section: {**sections.get(section, {}), **more.get(section, {})}
            for section in {**sections, **more}
        }
        merged["training"] = {"num_steps": 5, **merged.get("training", {})}
        merged["evaluation"] = {"interval": 2}
        return small_data.run(tmp_path / name, **merged)

    uninterrupted = run("uninterrupted")
    ranks(world_size).run(complete, uninterrupted)
    first = run("resumed", training={"stop_after_steps": 3})
    ranks(world_size).run(complete, first)
    assert summary(first)["exit_reason"] == "stop_after_steps"
    resumed = run("resumed", checkpoint={"resume": True})
    ranks(world_size).run(complete, resumed)

    assert_same_final_state(resumed, uninterrupted)
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in final_tensors(resumed)
    compared_keys = (
        "step",
        "consumed_tokens",
        "training_flops",
        "train_loss",
        "gradient_norm",
        "learning_rate",
    )
    assert [[record[key] for key in compared_keys] for record in records(resumed)] == [
        [record[key] for key in compared_keys] for record in records(uninterrupted)
    ]
    assert summary(resumed)["final_validation_loss"] == summary(uninterrupted)["final_validation_loss"]
    provenance = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert [session["from_step"] for session in provenance["sessions"]] == [0, 3]


def test_records_after_the_checkpoint_are_replaced_on_resume(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    first = small_data.run(tmp_path / "run", training={"num_steps": 7, "stop_after_steps": 4})
    ranks(1).run(complete, first)
    metrics = tmp_path / "run" / "metrics.jsonl"
    # The file after a crash: steps after the checkpoint, and an incomplete last line.
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 5}\n{"kind": "train", "st')
    resumed = small_data.run(tmp_path / "run", training={"num_steps": 7}, checkpoint={"resume": True})
    ranks(1).run(complete, resumed)
    assert [record["step"] for record in records(resumed)] == list(range(1, 8))


# World size, `parallel` section, micro batch size, engine.
SAMPLE_LAYOUTS: dict[str, tuple[int, dict[str, Any], int, str]] = {
    "tensor": (2, {"tensor": 2}, 2, "megatron"),
    "data": (2, {}, 4, "megatron"),
    "context": (2, {"context": 2}, 8, "megatron"),
    "pipeline": (2, {"pipeline": 2}, 2, "megatron"),
    "DeepSpeed": (2, {}, 2, "deepspeed"),
    "tensor and data": (4, {"tensor": 2, "sequence": True}, 1, "megatron"),
    "tensor and context": (4, {"tensor": 2, "sequence": True, "context": 2}, 4, "megatron"),
    "tensor and pipeline": (4, {"tensor": 2, "sequence": True, "pipeline": 2}, 4, "megatron"),
}


def losses_and_bits(config: RunConfig) -> list[float]:
    result = summary(config)
    losses = [record["train_loss"] for record in records(config)]
    return [*losses, result["final_validation_loss"], result["validation_bits_per_byte"]]


@pytest.fixture(scope="module")
def single_rank_losses(
    ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    config = small_data.run(folder / "run", training={"num_steps": 5, "micro_batch_size": 8})
    ranks(1).run(complete, config)
    return losses_and_bits(config)


@pytest.mark.parametrize(
    "layout", cases(SAMPLE_LAYOUTS, default=["data", "context", "pipeline", "DeepSpeed"])
)
def test_every_layout_has_the_single_rank_losses(
    ranks: Any, small_data: SmallData, tmp_path: Path, single_rank_losses: list[float], layout: str
) -> None:
    world_size, parallel, micro_batch_size, engine = SAMPLE_LAYOUTS[layout]
    config = small_data.run(
        tmp_path / "run",
        parallel=parallel,
        training={"num_steps": 5, "micro_batch_size": micro_batch_size, "engine": engine},
    )
    ranks(world_size).run(complete, config)
    assert losses_and_bits(config) == pytest.approx(single_rank_losses, rel=LOSS_AFTER_FIVE_STEPS)


def complete_with_nan_weights(config: RunConfig, broken_rank: int) -> None:
    def set_weights_to_nan(run: Any) -> None:
        if run.progress.step == 2:
            with torch.no_grad():
                next(run.engine.model_chunks[0].parameters()).fill_(float("nan"))

    complete_with_callback(config, broken_rank, set_weights_to_nan)


def test_the_fault_of_a_non_finite_loss_names_step_and_rank(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(tmp_path / "run", health={"skipped_in_a_row": 0})
    with pytest.raises(
        AssertionError, match=r"step 3: the loss is not finite on rank 1 microbatch 0 \(nan\)"
    ):
        ranks(2).run(complete_with_nan_weights, config, 1)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [record["step"] for record in records(config)] == [1, 2]


def test_an_existing_run_directory_is_refused(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = small_data.run(tmp_path / "run", training={"num_steps": 4})
    ranks(1).run(complete, config)
    with pytest.raises(FieldError, match=r"already holds a run; set checkpoint\.resume=auto"):
        RunFiles.check_directory(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"seed": 2}}, r"training\.seed=2: was 1234 in the run to resume"),
        ({"optimizer": {"learning_rate": 1e-4}}, r"optimizer\.learning_rate=0\.0001: was 0\.003"),
        ({"model": {"ffn_hidden_size": 96}}, r"model\.ffn_hidden_size=96: was 64"),
    ],
)
def test_a_run_is_not_resumed_with_another_config(
    ranks: Any, small_data: SmallData, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    ranks(1).run(complete, small_data.run(tmp_path / "run", training={"num_steps": 4}))
    merged = {"training": {"num_steps": 4, **sections.pop("training", {})}, **sections}
    other = small_data.run(tmp_path / "run", checkpoint={"resume": True}, **merged)
    with pytest.raises(FieldError, match=message):
        RunFiles.check_directory(other)
    allowed = small_data.run(
        tmp_path / "run", checkpoint={"resume": True}, training={"num_steps": 4}, logging={"interval": 3}
    )
    RunFiles.check_directory(allowed)


def test_resuming_a_finished_run_changes_no_file(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    ranks(1).run(complete, small_data.run(tmp_path / "run", training={"num_steps": 4}))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    resumed = small_data.run(tmp_path / "run", training={"num_steps": 4}, checkpoint={"resume": True})
    ranks(1).run(complete, resumed)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_an_unwritable_run_directory_is_refused_before_training(
    small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileProblem, match=r"cannot be written \(.*file is a file\); choose another"):
        RunFiles.check_directory(small_data.run(tmp_path / "file" / "run"))


def test_the_run_directory_contains_provenance_and_summary(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 4},
        logging={"trackers": ["tensorboard"], "communication_counter": True},
    )
    ranks(2).run(complete, config)
    from sas_megatron.config.loading import load_run_config

    assert load_run_config(tmp_path / "run" / "config.yaml") == config
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["world_size"] == 2
    assert provenance["packages"]["megatron-core"]
    assert provenance["machine"]["processor"]
    assert provenance["corpus"]["text"]["bin_sha256"]
    result = summary(config)
    assert result["exit_reason"] == "finished"
    assert result["tokens"] == 4 * 8 * 40
    assert result["training_flops"] == result["tokens"] * sum(result["training_flops_per_token"].values())
    (sent,) = result["communication_bytes_sent"]
    assert sent["ranks"] == [0, 1], "data-parallel ranks send the same number of bytes"
    assert sent["sent"]["data"]["allreduce"] > 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
