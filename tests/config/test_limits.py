"""Numbers beyond the limits of libraries, and YAML that expands without end, are refused with one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sas_megatron.cli.costs import count_costs
from sas_megatron.config.data import MAX_PREFIXES
from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import MAX_LISTED_PROBLEMS, build_run_config, load_run_config
from sas_megatron.config.model import MAX_LAYERS
from sas_megatron.config.section import MAX_INTEGER
from sas_megatron.config.yaml_text import MAX_DEPTH, MAX_FILE_BYTES, MAX_VALUES, parse_yaml
from sas_megatron.scaling.laws.point_table import read_points
from tests.fork_server import run_command
from tests.run_configs import small_config, small_tree


def alias_bomb(levels: int) -> str:
    """Return a flow mapping in which each list names the one before nine times."""
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{level}: &a{level} [{', '.join(9 * [f'*a{level - 1}'])}]" for level in range(1, levels)]
    return f"{{{', '.join(lists)}}}"


REFUSED_YAML: dict[str, tuple[str, str]] = {
    "nested lists": ("[" * 3000 + "]" * 3000, f"is nested more than {MAX_DEPTH} levels deep"),
    "nested mappings": ("{a: " * 60 + "1" + "}" * 60, f"is nested more than {MAX_DEPTH} levels deep"),
    "unclosed lists": ("[" * 90_000, f"is nested more than {MAX_DEPTH} levels deep"),
    "alias bomb": (alias_bomb(9), "has more than 100,000 values, counting each alias as a copy"),
    "list with itself": ("&a [*a]", "has an alias within the value that it names"),
    "mapping with itself": ("&a {b: {c: *a}}", "has an alias within the value that it names"),
    "decimal digits": ("9" * 400, "has an integer of more than 300 digits"),
    # Python cannot convert it to text, as a message needs it.
    "hexadecimal digits": ("0x" + "f" * 5000, "has an integer of more than 300 digits"),
    "NUL": (r'"a\0b"', "has text with a NUL character, which no path or name can contain"),
    "surrogate": (r'"\ud800"', "has text with an unpaired surrogate, which UTF-8 cannot represent"),
}


@pytest.mark.parametrize("name", REFUSED_YAML)
def test_yaml_that_is_too_large_is_refused_in_files_and_overrides(tmp_path: Path, name: str) -> None:
    text, problem = REFUSED_YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {text}\n")
    with pytest.raises(FileProblem) as in_file:
        load_run_config(path)
    assert str(in_file.value) == f"{path}: {problem}; correct the file"
    path.write_text("model: {}\n")
    with pytest.raises(UserError) as in_override:
        load_run_config(path, [f"model.num_layers={text}"])
    assert f": the value {problem}; correct it" in str(in_override.value)


def test_yaml_within_the_limits_is_read() -> None:
    assert len(parse_yaml(f"[{', '.join(['1'] * (MAX_VALUES - 1))}]")) == MAX_VALUES - 1
    depth = MAX_DEPTH
    assert parse_yaml("[" * depth + "]" * depth) is not None
    assert parse_yaml(alias_bomb(4))["a3"][8][8][8] == ["x"] * 9
    assert parse_yaml("9" * 300) == int("9" * 300)


def test_a_file_that_is_no_config_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=rf"^/dev/zero: has more than {MAX_FILE_BYTES:,} bytes; give a"):
        load_run_config("/dev/zero")


LIMITS: dict[str, tuple[dict[str, Any], str]] = {
    "seed of numpy": (
        {"training": {"seed": 2**32}},
        r"training.seed=4294967296: must be at least 0 and below",
    ),
    "timeout of torch": (
        {"training": {"collective_timeout_minutes": 1e308}},
        r"training.collective_timeout_minutes=1e\+308: must be at most 525,600, since torch cannot",
    ),
    "layers": (
        {"model": {"num_layers": 2**31}},
        rf"model.num_layers=2147483648: must be at most {MAX_LAYERS:,}",
    ),
    "token ids": (
        {"model": {"vocab_size": 2**31}},
        r"model.vocab_size=2147483648: must be at most 2,147,483,647",
    ),
    "padded token ids": (
        {"model": {"vocab_multiple": 2**31}},
        r"model.vocab_multiple=2147483648: must be at most",
    ),
    "positions": ({"data": {"sequence_length": 2**31}}, r"data.sequence_length=2147483648: must be at most"),
    "blended data sets": (
        {"data": {"prefixes": ["a"] * (MAX_PREFIXES + 1)}},
        r"data.prefixes=\[a, …\]: has 32,767 entries, and Megatron-core blends at most 32,766; prepare",
    ),
    "infinite sum of weights": (
        {"data": {"prefixes": ["a", "b"], "weights": [1e308, 1e308]}},
        r"data.weights=\[1e\+308, 1e\+308\]: must have a finite sum, and no number below",
    ),
    "vanishing weight": (
        {"data": {"prefixes": ["a", "b"], "weights": [1e-300, 1e300]}},
        r"data.weights=.*: must have",
    ),
    "infinite sum of shares": ({"data": {"split": [1e308, 1e308]}}, r"data.split=.*: must have a finite sum"),
    "names of a file system": (
        {"logging": {"run_directory": f"runs/{'n' * 300}"}},
        r"logging.run_directory=runs/n+: has a name of more than 230 bytes, or more than 3800 char",
    ),
    "bytes of a name": (
        {"data": {"tokenizer": 100 * "wörter"}},
        r"data.tokenizer=(wörter)+: has a name of more",
    ),
    "paths of a file system": (
        {"data": {"prefixes": ["a", 4000 * "/a"]}},
        r"data.prefixes=\['a', .*: has a name",
    ),
    "long path of weights": (
        {"checkpoint": {"branch_from": 300 * "n"}},
        r"checkpoint.branch_from=n+: has a name",
    ),
    "ranks": (
        {
            "attention": {"kind": "mha", "num_heads": 2**40, "head_dim": 6},
            "parallel": {"tensor": 2**20, "context": 2**20},
        },
        r"parallel=parallel.tensor=1048576 × context=1048576: gives 1,099,511,627,776 ranks, and torch",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_libraries_are_rules_of_the_config(name: str) -> None:
    sections, message = LIMITS[name]
    with pytest.raises(FieldError, match=f"^{message}"):
        small_config(**sections)


def test_the_largest_seed_and_timeout_are_accepted() -> None:
    training = small_config(training={"seed": 2**32 - 1, "collective_timeout_minutes": 525_600}).training
    assert training.seed == 2**32 - 1


@pytest.mark.timeout(20)
def test_costs_of_a_batch_with_astronomically_many_microbatches_are_counted_at_once() -> None:
    many = small_config(training={"global_batch_size": MAX_INTEGER, "micro_batch_size": 1})
    few = small_config(training={"global_batch_size": 64, "micro_batch_size": 1})
    activations = [count_costs(config)["activation_bytes_of_a_rank"] for config in (many, few)]
    assert activations[0] == activations[1]
    with pytest.raises(
        FieldError, match=r"world size=3: must be a multiple of 2, .*; start 2 or 4 or 8 or 16 "
    ):
        small_config(
            training={"global_batch_size": MAX_INTEGER, "micro_batch_size": 1}, parallel={"tensor": 2}
        ).check_world_size(3)


def test_messages_show_the_beginning_of_long_values_and_lists() -> None:
    tree = small_tree()
    tree["model"] |= {"activation": "long " * 4000} | {f"no_{number}": 1 for number in range(30)}
    with pytest.raises(UserError) as caught:
        build_run_config(tree)
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_LISTED_PROBLEMS
    assert lines[-1].endswith("(and 11 more problems)")
    assert any("… (20,002 characters)" in line for line in lines)
    assert len(str(caught.value)) < 6000
    with pytest.raises(FieldError, match=r"logging.profile_steps=\[1, 1, .*… \(12,000 characters\): must be"):
        small_config(logging={"profile_steps": [1] * 4000})


def test_an_override_that_is_too_long_for_a_file_name_is_an_override() -> None:
    done = run_command("costs", "configs/quickstart_mha.yaml", f"model.num_layers={'9' * 300}")
    assert done.returncode == 2
    assert done.stderr.startswith("sas-megatron: error: model.num_layers=999")
    assert "must be between -2^53 and 2^53" in done.stderr


def test_long_names_from_a_file_do_not_lengthen_a_message(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"params,tokens,loss,variant\n1,1,1,{'a' * 70_000}\n1,1,1,b\n")
    with pytest.raises(FieldError, match=r"the points contain a+… \(70,\d+ characters\); choose one"):
        read_points(path)


def test_an_error_of_the_yaml_reader_itself_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  num_layers: 2\noptimizer:\n%YAML 9.9\n  learning_rate: 0.003\n")
    with pytest.raises(
        FileProblem, match=r"config.yaml: is not YAML \(KeyError\(\(9, 9\)\)\); correct the file"
    ):
        load_run_config(path)
