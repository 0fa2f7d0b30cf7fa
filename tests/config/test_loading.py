"""Tests of reading and writing YAML, of overrides, and of invalid files."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from sas_megatron.config.attention import resolve_kind
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.config.loading import build_run_config, dump_yaml, load_run_config, read_yaml
from sas_megatron.config.run import RunConfig
from tests.run_configs import SHIPPED, small_config

SMALL = """\
model: {num_layers: 2, hidden_size: 20, ffn_hidden_size: 28, vocab_size: 45}
attention: {kind: sas, num_heads: 4, head_dim: 6}
data: {prefixes: [corpus], tokenizer: tokenizer.model, sequence_length: 12}
optimizer: {learning_rate: 1e-3}
training: {num_steps: 9, global_batch_size: 4, micro_batch_size: 2}
logging: {run_directory: run}
"""


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_configs_are_shipped() -> None:
    assert {"quickstart_mha", "quickstart_sas"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_shipped_config_is_equal_after_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(config), encoding="utf-8")
    assert load_run_config(dumped) == config
    assert dump_yaml(load_run_config(dumped)) == dump_yaml(config)


@pytest.mark.parametrize(
    "name", ["größe", "null", "yes", "1e-3", "0x10", "a: b", "# not a comment", " ", "2020-01-02"]
)
def test_string_that_looks_like_another_type_stays_a_string(name: str, tmp_path: Path) -> None:
    config = small_config(
        logging={"run_directory": name}, optimizer={"learning_rate": 3e-05, "epsilon": 1e-12}
    )
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(config), encoding="utf-8")
    assert load_run_config(dumped) == config


def test_the_former_name_of_the_communication_counter_loads(tmp_path: Path) -> None:
    former = tmp_path / "former.yaml"
    former.write_text(SMALL.replace("{run_directory: run}", "{run_directory: run, wire_ledger: true}"))
    config = load_run_config(former)
    assert config.logging.communication_counter
    assert "wire_ledger" not in dump_yaml(config)
    assert not load_run_config(former, ["logging.communication_counter=false"]).logging.communication_counter


def test_common_notations_of_numbers_are_read(small_file: Path) -> None:
    assert load_run_config(small_file).optimizer.learning_rate == 0.001
    for text, number in {"6e-4": 6e-4, "1E-3": 1e-3, "1": 1.0, ".5": 0.5, "+2.5e+0": 2.5}.items():
        config = load_run_config(small_file, [f"optimizer.learning_rate={text}"])
        assert config.optimizer.learning_rate == number


def test_overrides_change_only_their_fields_and_later_ones_win(small_file: Path) -> None:
    config = load_run_config(
        small_file,
        [
            "model.num_layers=3",
            "parallel.tensor=2",
            "model.num_layers=5",
            "data.prefixes=[a, b=c]",
            "data.weights=",
        ],
    )
    assert (config.model.num_layers, config.parallel.tensor) == (5, 2)
    assert (config.data.prefixes, config.data.weights) == (["a", "b=c"], None)
    expected = load_run_config(small_file).model_dump()
    expected["model"]["num_layers"], expected["parallel"]["tensor"] = 5, 2
    expected["data"]["prefixes"] = ["a", "b=c"]
    assert config.model_dump() == expected


def test_overridden_kind_has_the_fields_of_that_kind(small_file: Path) -> None:
    assert load_run_config(small_file, ["attention.kind=mqa"]).attention.num_key_value_heads == 1
    with pytest.raises(UserError, match=r"attention.kernel_size=3: no such key"):
        load_run_config(small_file, ["attention.kind=mha", "attention.kernel_size=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_layers",
            "override 'model.num_layers': must have the form section.field=value; "
            "write model.num_layers=4, for example",
        ),
        (
            "num_layers=4",
            "override 'num_layers=4': must have the form section.field=value; "
            "write model.num_layers=4, for example",
        ),
        (
            "model.=4",
            "override 'model.=4': must have the form section.field=value; "
            "write model.num_layers=4, for example",
        ),
        ("", "override '': must have the form section.field=value; write model.num_layers=4, for example"),
        (
            "model.num_layers=[",
            "override 'model.num_layers=[': the value is not YAML (while parsing a flow node expected the "
            "node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^ (line: "
            "1)); correct it, or quote it if it is text",
        ),
        (
            "logging.run_directory=2020-13-45",
            "override 'logging.run_directory=2020-13-45': the value is not YAML (month must be in 1..12); "
            "correct it, or quote it if it is text",
        ),
        (
            "model.num_layers.x=4",
            "override 'model.num_layers.x=4': num_layers is a value, not a section; "
            "did you mean model.num_layers?",
        ),
        (
            "model.num_attention_heads=4",
            "model.num_attention_heads=4: no such key; did you mean attention.num_heads?",
        ),
    ],
)
def test_malformed_override_shows_the_valid_form(small_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(small_file, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {num_layers: 2", r"is not YAML \(.*line 1.*\); correct the file"),
        (
            b"model: 1\nmodel: 2\n",
            r'is not YAML \(.*found duplicate key "model".*line 2.*\); correct the file',
        ),
        (b"model: {a: 2020-13-45}", r"is not YAML \(month must be in 1..12.*\); correct the file"),
        (b"- model\n- data\n", r"has no sections; start from one of the files in configs/"),
        (b"", r"has no sections; start from one of the files in configs/"),
        (b"model: \xff\xfe", r"is not UTF-8 text \(.*\); give a YAML file"),
        (b"model: \x00", r"is not YAML \(.*\); correct the file"),
    ],
    ids=["broken", "duplicate keys", "no date", "list", "empty", "other encoding", "binary"],
)
def test_error_names_a_file_that_is_not_a_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(FileProblem, match=f"^{path}: {message}$"):
        load_run_config(path)


def test_error_names_an_unreadable_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(FileProblem) as caught:
        load_run_config(missing)
    assert str(caught.value) == f"{missing}: cannot be read (No such file or directory); check the path"
    with pytest.raises(FileProblem, match="Is a directory"):
        read_yaml(tmp_path)


def test_config_is_immutable() -> None:
    config = small_config()
    with pytest.raises(ValueError, match="frozen"):
        config.model.num_layers = 3


def test_every_field_has_a_description() -> None:
    sections: list[type[BaseModel]] = [resolve_kind(kind) for kind in KINDS]
    for field in RunConfig.model_fields.values():
        assert isinstance(field.annotation, type)
        sections.append(field.annotation)
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not undescribed
    assert all(section.__doc__ for section in sections)


def test_simulated_head_dim_defaults_to_the_next_even_number_from_1_5_head_dim(small_file: Path) -> None:
    widths = {}
    for width in range(2, 12):
        config = load_run_config(small_file, [f"attention.head_dim={width}", "attention.rotary_dim=2"])
        widths[width] = config.attention.query_key_dim
    assert widths == {2: 4, 3: 6, 4: 6, 5: 8, 6: 10, 7: 12, 8: 12, 9: 14, 10: 16, 11: 18}
    assert load_run_config(small_file, ["attention.simulate_features=false"]).attention.query_key_dim == 6


def test_building_a_config_does_not_change_the_mappings(small_file: Path) -> None:
    tree = read_yaml(small_file)
    build_run_config(tree)
    assert tree == read_yaml(small_file)
