"""Spellings, units and files that users bring from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import build_run_config, load_run_config
from sas_megatron.config.optimizer import OptimizerConfig
from sas_megatron.scaling.study.study_file import load_study
from tests.conftest import ROOT
from tests.run_configs import small_config, small_tree


@pytest.mark.parametrize(
    ("spelling", "precision"),
    [
        *((spelling, "bfloat16") for spelling in ("bf16", "BF16", "bfloat16", "torch.bfloat16")),
        *((spelling, "float32") for spelling in ("fp32", "f32", "float", "torch.float32", "32", 32)),
    ],
)
def test_common_spellings_of_precisions_are_read(spelling: Any, precision: str) -> None:
    assert small_config(training={"precision": spelling}).training.precision == precision


@pytest.mark.parametrize("spelling", ["fp16", "half", 16, "fp8"])
def test_a_precision_that_is_not_offered_is_named(spelling: Any) -> None:
    with pytest.raises(FieldError, match=rf"training.precision={spelling}: is not offered: .*; use bfloat16"):
        small_config(training={"precision": spelling})


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    quickstart = ROOT / "configs" / "quickstart_mha.yaml"
    config = load_run_config(quickstart, ["model.rotary_base=5e5", "training.num_steps=1e3"])
    assert (config.model.rotary_base, config.training.num_steps) == (500_000, 1000)
    assert type(config.model.rotary_base) is int
    assert load_run_config(quickstart, ["checkpoint.at_steps=[1e2, 50]"]).checkpoint.at_steps == [100, 50]
    with pytest.raises(UserError, match=r"model.rotary_base=0.5: must be a valid integer"):
        load_run_config(quickstart, ["model.rotary_base=5e-1"])
    with pytest.raises(UserError, match=r"model.rotary_base=1e\+30: must be a valid integer"):
        load_run_config(quickstart, ["model.rotary_base=1e30"])


# Options of Megatron-LM in a run with 4 samples per step, 9 steps and heads of 6 features -> the hint.
HINTS: dict[str, tuple[str, Any, str]] = {
    "windows": (
        "evaluation.eval_iters",
        100,
        "eval_iters counts iterations of a global batch, evaluation.num_sequences windows; "
        "use evaluation.num_sequences=400",
    ),
    "fraction": (
        "schedule.min_lr",
        1e-3,
        "min_lr is a learning rate, schedule.final_fraction a fraction of optimizer.learning_rate; "
        "use schedule.final_fraction=0.1",
    ),
    "inverted": (
        "model.untie-embeddings-and-output-weights",
        True,
        "untie_embeddings_and_output_weights is the opposite of model.tie_embeddings; "
        "use model.tie_embeddings=false",
    ),
    "samples": (
        "training.train_samples",
        80,
        "train_samples counts samples, training.num_steps global batches; use training.num_steps=20",
    ),
    "minutes": (
        "training.exit_duration_in_mins",
        3,
        "exit_duration_in_mins counts minutes, training.stop_after_seconds seconds; "
        "use training.stop_after_seconds=180",
    ),
    "fraction of a head": (
        "model.rotary_percent",
        0.5,
        "rotary_percent is a fraction of a head, attention.rotary_dim a number of its features; "
        "use attention.rotary_dim=3",
    ),
    "layers of a chunk": (
        "parallel.num_layers_per_virtual_pipeline_stage",
        1,
        "num_layers_per_virtual_pipeline_stage counts the layers of a model chunk, "
        "parallel.virtual_pipeline the chunks of a stage; use parallel.virtual_pipeline=2",
    ),
    "switch": (
        "training.bf16",
        True,
        "bf16 is a switch, training.precision a data type; use training.precision=bfloat16",
    ),
    "value of another type": (
        "schedule.min_lr",
        "low",
        "min_lr is a learning rate, schedule.final_fraction a fraction of optimizer.learning_rate; "
        "use schedule.final_fraction",
    ),
    "not offered": (
        "training.fp8",
        True,
        "fp8 is not offered: training.precision is float32 or bfloat16",
    ),
    "not offered, and like no key": (
        "optimizer.muon",
        True,
        f"muon is not offered; the fields of optimizer are {', '.join(OptimizerConfig.model_fields)}",
    ),
    "another command": (
        "data.mock_data",
        True,
        "mock_data is not offered: use the option --mock-data of `sas-megatron train`",
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_hints_for_options_of_megatron_name_the_unit(case: str) -> None:
    path, value, hint = HINTS[case]
    section, field = path.split(".")
    tree = small_tree()
    tree.setdefault(section, {})[field] = value
    with pytest.raises(UserError) as caught:
        build_run_config(tree)
    assert str(caught.value) == f"{path}={value!r}: no such key; {hint}"


@pytest.mark.parametrize("case", [case for case, (_, _, hint) in HINTS.items() if "; use " in hint])
def test_the_field_of_a_hint_accepts_the_value(case: str) -> None:
    field, equals, value = HINTS[case][2].rpartition("use ")[2].partition("=")
    if equals and field != "attention.rotary_dim":  # 3 features: half of 6 are not pairs
        overrides = ["schedule.warmup_steps=2", "parallel.pipeline=2", "parallel.tensor=1"]
        load_run_config(ROOT / "configs" / "quickstart_mha.yaml", [*overrides, f"{field}={value}"])


CLUSTER = """\
data: {prefixes: [/scratch/corpus], tokenizer: /scratch/tokenizer.model, sequence_length: 8}
attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 6}
optimizer: {learning_rate: 0.5, weight_decay: 0.25}
logging: {run_directory: nowhere}
"""
RUN = """\
base: ../cluster.yaml
model: {num_layers: 2, hidden_size: 20, ffn_hidden_size: 28, vocab_size: 45}
data: {sequence_length: 12}
optimizer: {learning_rate: 0.01}
training: {num_steps: 9, global_batch_size: 4, micro_batch_size: 2}
logging: {run_directory: run}
"""


@pytest.fixture
def based(tmp_path: Path) -> Path:
    """Return a run config in a folder, whose base is in the folder above."""
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "run.yaml"
    path.write_text(RUN)
    return path


def test_a_run_has_the_fields_of_its_base_that_it_does_not_set(
    based: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, based.parent, Path("/")):  # a base is relative to its file
        monkeypatch.chdir(folder)
        config = load_run_config(based, ["optimizer.beta1=0.8"])
        assert config.data.prefixes == ["/scratch/corpus"]
        assert config.data.sequence_length == 12
        assert config.optimizer.model_dump(include={"learning_rate", "weight_decay", "beta1"}) == {
            "learning_rate": 0.01,
            "weight_decay": 0.25,
            "beta1": 0.8,
        }
        assert config.attention.num_kv_heads == 2


def test_an_attention_of_another_kind_replaces_that_of_the_base(based: Path) -> None:
    based.write_text(RUN + "attention: {kind: mha, num_heads: 5, head_dim: 4}\n")
    assert load_run_config(based).attention.num_kv_heads is None
    based.write_text(RUN + "attention: {num_heads: 8}\n")
    attention = load_run_config(based).attention
    assert (attention.kind, attention.num_heads, attention.num_kv_heads) == ("gqa", 8, 2)


def test_a_base_may_have_a_base(based: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "base: site/paths.yaml\n" + CLUSTER.replace("/scratch/corpus", "x")
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "paths.yaml").write_text("data: {index_cache: /local}\n")
    config = load_run_config(based)
    assert (config.data.prefixes, config.data.index_cache) == (["x"], "/local")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("absent.yaml", r"base=absent.yaml: names no file \(.*/runs/absent.yaml\); write a path relative to"),
        ("[a, b]", r"base=\['a', 'b'\]: is not the path of a file; write base: cluster.yaml"),
        ("run.yaml", r"run.yaml: its base leads to .*run.yaml -> .*run.yaml; remove one base"),
        ("../runs/other.yaml", r"other.yaml: its base leads to .*run.yaml -> .*other.yaml -> .*run.yaml; "),
    ],
)
def test_a_base_that_cannot_be_followed_is_reported(based: Path, base: str, message: str) -> None:
    (based.parent / "other.yaml").write_text("base: run.yaml\n")
    based.write_text(RUN.replace("../cluster.yaml", base))
    with pytest.raises(FileProblem, match=message):
        load_run_config(based)


def test_a_damaged_base_is_named(based: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("data: {")
    with pytest.raises(FileProblem, match=r"cluster.yaml: is not YAML"):
        load_run_config(based)


def test_the_base_of_a_study_may_have_a_base(based: Path) -> None:
    study = based.parent / "study.yaml"
    study.write_text(
        "{base: run.yaml, directory: s, variants: {mha: {}}, sizes: {s: {}}, budgets: {tokens: [100]}}"
    )
    assert load_study(study)[1]["data"]["prefixes"] == ["/scratch/corpus"]
