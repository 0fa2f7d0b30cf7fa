"""The SAS operator on one device: its definition, and what a file that exports include may import."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

from sas_megatron.attention.sas import simulated_attention
from sas_megatron.attention.sas.simulated_attention import Simulation, SimulationShape
from sas_megatron.checkpoint import export
from sas_megatron.checkpoint.remote_code import simulated_attention as imported_by_exports
from tests.attention import definitions
from tests.attention.layer_case import drawn
from tests.tolerances import assert_near

STANDARD_LIBRARY = {"__future__", "abc", "collections.abc", "math", "typing"}
OPERATOR = Path(simulated_attention.__file__)


def build_simulation(*, with_features: bool, bias: bool) -> Simulation:
    shape = SimulationShape(
        num_heads={"query": 4, "value": 2},
        expansion=3,
        kernel_size=5,
        head_dim=6,
        simulated_head_dim=10 if with_features else None,
        bias=bias,
    )
    simulation = Simulation(shape, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in simulation.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, torch.float64))
    return simulation


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_features", [False, True])
@pytest.mark.parametrize(("name", "num_heads"), [("query", 4), ("key", 2), ("value", 2)])
def test_the_simulation_computes_its_definition(
    name: str, num_heads: int, with_features: bool, bias: bool
) -> None:
    simulation = build_simulation(with_features=with_features, bias=bias)
    weights = {f"simulation.{name}": weight for name, weight in simulation.named_parameters()}
    heads = drawn("heads", (7, num_heads, 6), torch.float64, scale=1.0)
    expected = heads.repeat(1, 3, 1) if name == "key" else definitions.simulate_heads(heads, weights, name)
    if with_features and name != "value":
        expected = definitions.simulate_features(expected, weights, name)
    assert_near(simulation(name, heads), expected, torch.float64, name)
    selected = simulation(name, heads, base_heads=slice(1, 2))
    copies = expected.unflatten(1, (3, num_heads))[:, :, 1]
    assert_near(selected, copies, torch.float64, f"copies of base head 1 of {name}")


def test_the_operator_imports_torch_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(OPERATOR.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            imported.add(str(node.module))
    assert {name for name in imported - STANDARD_LIBRARY if name.split(".")[0] != "torch"} == set()


def test_exports_include_the_operators_own_file_and_all_that_their_code_imports() -> None:
    shipped = {path.stem: path for path in export._MODEL_CODE}
    assert shipped["simulated_attention"] == OPERATOR
    assert imported_by_exports.Simulation is Simulation
    for path in shipped.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in shipped, f"{path.name} imports {node.module}"
                module = importlib.import_module(f"sas_megatron.checkpoint.remote_code.{node.module}")
                assert all(hasattr(module, alias.name) for alias in node.names)
