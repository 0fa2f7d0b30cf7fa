"""The shipped hardware files load, and errors of a file name the wrong field."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.planning.hardware_file import SHIPPED, load_hardware, shipped_names


@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_a_shipped_file_loads_and_states_its_sources(name: str) -> None:
    assert name in shipped_names()
    hardware = load_hardware(name)
    assert hardware.matrix_rate("bfloat16") > hardware.matrix_rate("float32")
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    assert "data sheet" in text
    assert "Assumptions" in text


def test_groups_within_a_node_use_its_link_and_other_groups_the_network() -> None:
    hardware = load_hardware("h100")
    assert hardware.link_between([0, 7]) == hardware.node_link
    assert hardware.link_between([7, 8]) == hardware.network_link


def test_the_error_names_the_file_and_its_wrong_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (SHIPPED / "h100.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("memory_gib: 79.6", "memory_gib: lots"), encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml: memory_gib: .*number"):
        load_hardware(path)
    path.write_text(text.replace("memory_gib: 79.6", "memory_gib: -1"), encoding="utf-8")
    with pytest.raises(UserError, match=r"hardware\.memory_gib=-1.*must be positive"):
        load_hardware(path)
    with pytest.raises(UserError, match="use a100, h100, h200, this-machine"):
        load_hardware("h900")


def test_a_file_with_the_former_names_of_the_links_loads(tmp_path: Path) -> None:
    path = tmp_path / "former.yaml"
    text = (SHIPPED / "h100.yaml").read_text(encoding="utf-8")
    former = text
    for name, former_name in (
        ("node_link:", "node_wire:"),
        ("network_link:", "network_wire:"),
        (" link:", " wire:"),
    ):
        assert former.count(name) == 1
        former = former.replace(name, former_name)
    path.write_text(former, encoding="utf-8")
    assert load_hardware(path) == load_hardware("h100")
    path.write_text(former + "node_link: null\n", encoding="utf-8")
    assert load_hardware(path).node_link is None


def test_needed_memory_includes_fragmentation_and_reserve() -> None:
    hardware = load_hardware("h100")
    available = (hardware.memory_gib - hardware.reserved_gib) * 2**30 / (1 + hardware.fragmentation)
    assert hardware.fits(available - 2**20)
    assert not hardware.fits(available + 2**20)


def test_a_missing_rate_is_reported() -> None:
    with pytest.raises(UserError, match="no rate for float8"):
        load_hardware("h100").matrix_rate("float8")


def test_a_missing_link_is_reported() -> None:
    single_node = load_hardware("h100").model_copy(update={"network_link": None})
    with pytest.raises(
        UserError, match=r"hardware\.network_link=None: must be given for 2 ranks; add it to the"
    ):
        single_node.link_between([7, 8])
