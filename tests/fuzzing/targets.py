"""What the fuzz targets read, and the valid files that are damaged; those of data are in `data_targets`.

A target calls the command itself in the child, or what the command calls before it would train or start other
processes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.hints import known_keys
from sas_megatron.config.loading import dump_tree
from tests.fork_server import ROOT
from tests.fuzzing.child import Seeds, Target, run_command, run_successfully
from tests.fuzzing.fixture_files import FIXTURES, exported_model, unpack
from tests.fuzzing.inputs import read_files, write_files
from tests.run_configs import small_tree

CONFIG_FIELDS = tuple(key for key in known_keys() if "." in key)
OVERRIDE_VALUES = (
    *(
        "",
        "null",
        "true",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "0.5",
        "1e308",
        ".nan",
        ".inf",
        "x",
        "[]",
        "{}",
        "[1]",
    ),
    *(
        "[a, b]",
        "{a: 1}",
        "4294967295",
        "4294967296",
        "9007199254740992",
        "9007199254740993",
        "1e400",
        "&a [*a]",
    ),
    *(
        "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 3000,
        "2020-13-45",
        "!!int x",
        "a: b: c",
        "'",
        "%",
        "\t",
        "|",
        "- 1",
    ),
)
# The fields of other attentions than mha.
ATTENTION_FIELDS = {
    "gqa": {"num_kv_heads": 2},
    "mfa": {"query_rank": 8},
    "mla": {"rotary_head_dim": 4, "kv_lora_rank": 12, "query_lora_rank": 8},
    "sas": {"head_expansion": 2},
}
STUDY = ROOT / "tests" / "scaling" / "fixtures" / "study"


def _build_configs() -> Seeds:
    trees = {
        kind: small_tree(
            attention={"kind": kind, "num_heads": 4, "head_dim": 6, **ATTENTION_FIELDS.get(kind, {})}
        )
        for kind in KINDS
    }
    trees["layout"] = small_tree(
        parallel={"tensor": 2, "sequence": True, "pipeline": 2, "context": 2},
        schedule={"kind": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 2},
        optimizer={"distributed": True},
        checkpoint={"interval": 2, "at_steps": [1, 3], "keep_last": 2},
        data={"weights": [1.0], "split": [0.9, 0.1]},
    )
    return {name: {"config.yaml": dump_tree(tree).encode()} for name, tree in trees.items()}


def _run_config(arguments: tuple[str, ...]) -> None:
    command = ("train", "--dry-run") if arguments[0] == "--" else ("costs",)
    run_command(*command, *arguments)


def _build_studies() -> Seeds:
    base = dump_tree(small_tree()).encode()
    study: dict[str, Any] = {
        "base": "base.yaml",
        "directory": "study",
        "variants": {"mha": {}, "sas": {"head_expansion": 2}},
        "sizes": {"small": {"model.num_layers": 1}, "large": {"model.num_layers": 2}},
        "budgets": {"tokens": [2000, 4000]},
        "match": "none",
    }
    variations: dict[str, dict[str, Any]] = {
        "grid": {},
        "isoflop": {"budgets": {"flops": [1e9, 2e9]}, "trunks": "none", "seeds": 2},
        "sweep": {
            "learning_rate": {"rule": "sweep", "factors": [0.5, 1.0, 2.0]},
            "seeds": {"mha": 2, "sas": 1},
        },
        "axes": {
            "axes": {"length": {"s12": {"data.sequence_length": 12}, "s24": {"data.sequence_length": 24}}},
            "machine": {"processes": 1, "teraflops": 1.0, "price_per_hour": 2.0},
            "seed_noise": 0.01,
        },
        "matched": {"match": "params", "tolerance": 0.5, "sizes": {"small": {"model.num_layers": 1}}},
    }
    files = {
        name: {"study.yaml": dump_tree(study | changes).encode(), "base.yaml": base}
        for name, changes in variations.items()
    }
    recorded = ("layouts.json", "learning_rates.json", "step_seconds.json")
    files["recorded"] = {
        **{name: (STUDY / name).read_bytes() for name in ("study.yaml", "base.yaml")},
        **{f"study/{name}": (STUDY / "study" / name).read_bytes() for name in recorded},
    }
    return files


def _run_study(arguments: tuple[str, ...]) -> None:
    run_command("study", "plan", "study.yaml", *arguments)


def _build_models() -> Seeds:
    from sas_megatron.checkpoint.importing import open_model, write_model
    from tests.fuzzing.small_models import small_models

    seeds = {"exported": exported_model(), **small_models()}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder, "source"), seeds["exported"])
        write_model(open_model(Path(folder, "source")), Path(folder, "imported"))
        seeds["imported"] = read_files(Path(folder, "imported"))
    seeds["imported"]["config.yaml"] = (FIXTURES / "one_process.yaml").read_bytes()
    return seeds


def _run_import(_arguments: tuple[str, ...]) -> None:
    if Path("config.yaml").exists():
        from sas_megatron.checkpoint.tensor_files import StoredTensors
        from sas_megatron.checkpoint.weights_source import find_weights
        from sas_megatron.config.loading import load_run_config

        find_weights(Path(), load_run_config("config.yaml"))
        dict(StoredTensors(Path(), stem="weights"))
        return
    try:
        run_successfully("checkpoint", "import", ".", "--output", "../output")
    finally:
        shutil.rmtree("../output", ignore_errors=True)


def _build_runs() -> Seeds:
    files = unpack("data") | unpack("one_process", folder="run")
    files["config.yaml"] = (FIXTURES / "one_process.yaml").read_bytes()
    study = {
        str(path.relative_to(STUDY)).replace("study/runs/", "run/"): path.read_bytes()
        for path in STUDY.rglob("*")
        if path.is_file()
    }
    study = {path: content for path, content in study.items() if not path.startswith("study/logs")}
    return {"run": files, "study": study}


def _run_run(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.evaluation.model_source import find_model_source
    from sas_megatron.scaling.runs import load_run

    if Path("study.yaml").exists():
        # The table is written where the study's runs are not: their folder is damaged.
        Path("study/runs").unlink(missing_ok=True)
        Path("study/runs").symlink_to("../run")
        run_successfully("study", "collect", "study.yaml", "--output", "../table.parquet")
        return
    run_successfully("train", "--check", "config.yaml", "checkpoint.resume=true", "logging.run_directory=run")
    load_run("run")
    find_model_source(Path("run"))


def _build_tables() -> Seeds:
    sizes, budgets = (1e6, 2e6, 4e6, 8e6), (1e8, 3e8, 1e9)
    rows = [
        (size, tokens, 1.7 + 400 / size**0.34 + 410 / tokens**0.28) for size in sizes for tokens in budgets
    ]
    lines = ["params,tokens,loss,flops,size,variant"]
    lines += [
        f"{size:g},{tokens:g},{loss:.4f},{6 * size * tokens:g},{size:g},mha" for size, tokens, loss in rows
    ]
    text = "\n".join(lines)
    records = (json.dumps({"params": size, "tokens": tokens, "loss": loss}) for size, tokens, loss in rows)
    contents = {
        "csv": text.encode(),
        "semicolons": text.replace(",", ";").encode("utf-16"),
        "json": "\n".join(records).encode(),
    }
    return {name: {"points.csv": content} for name, content in contents.items()}


def _run_table(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.scaling.laws.point_table import read_points

    read_points("points.csv").check_surface()


def _build_hardware() -> Seeds:
    from sas_megatron.planning.hardware_file import SHIPPED

    return {path.stem: {"device.yaml": path.read_bytes()} for path in SHIPPED.glob("*.yaml")}


def _run_hardware(_arguments: tuple[str, ...]) -> None:
    from sas_megatron.planning.hardware_file import load_hardware

    device = load_hardware("device.yaml")
    device.fits(device.needed_bytes(2**30))


def _build_checkpoints() -> Seeds:
    return {"checkpoint": unpack("data") | unpack("one_process", folder="run")}


def _run_checkpoint(_arguments: tuple[str, ...]) -> None:
    run_successfully("checkpoint", "verify", "run")
    try:
        run_successfully("checkpoint", "export", "run", "--output", "../output")
    finally:
        shutil.rmtree("../output", ignore_errors=True)


CONFIGS = Target(_build_configs, _run_config, ("--", "config.yaml"))
STUDIES = Target(_build_studies, _run_study)
MODELS = Target(_build_models, _run_import)
TABLES = Target(_build_tables, _run_table)
HARDWARE = Target(_build_hardware, _run_hardware)
RUNS = Target(_build_runs, _run_run)
CHECKPOINTS = Target(_build_checkpoints, _run_checkpoint)
