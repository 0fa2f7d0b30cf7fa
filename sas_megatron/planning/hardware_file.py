"""What one device can do, as a hardware file states it: peak figures, and the shares attained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import read_yaml
from sas_megatron.config.section import Section

SHIPPED = Path(__file__).parent / "hardware"
BYTES_PER_GIB = 2**30


class LinkFigures(Section):
    """One way between two devices."""

    section_name: ClassVar[str] = "wire"

    gigabytes_per_second: float = Field(description="Of one device, in one direction; 1 GB is 10⁹ bytes.")
    latency_microseconds: float = Field(description="Of one message between neighbours.")

    @model_validator(mode="after")
    def _check(self) -> LinkFigures:
        self.require_positive("gigabytes_per_second", "latency_microseconds")
        return self


class AttainableShares(Section):
    """Shares of the peak figures that training attains."""

    section_name: ClassVar[str] = "attainable"

    matrix: float = Field(description="Matrix products, of matrix_teraflops.")
    convolution: float = Field(description="Convolutions over few channels, of matrix_teraflops.")
    attention: float = Field(description="Fused attention, of matrix_teraflops; the hidden half is skipped.")
    memory: float = Field(description="Of memory_gigabytes_per_second.")
    wire: float = Field(description="Of gigabytes_per_second of both wires.")

    @model_validator(mode="after")
    def _check(self) -> AttainableShares:
        self.require_positive("matrix", "convolution", "attention", "memory", "wire")
        return self


class Hardware(Section):
    """One device, and the wires to others."""

    section_name: ClassVar[str] = "hardware"

    name: str = Field(description="What is meant, for readers.")
    device: Literal["gpu", "cpu"] = Field(description="Decides which attention kernels are simulated.")
    memory_gib: float = Field(description="Of one device; on CPU, of one process.")
    matrix_teraflops: dict[str, float] = Field(description="Dense peak by dtype, 10¹² FLOP/s.")
    memory_gigabytes_per_second: float = Field(description="Peak, read and write together.")
    node_wire: LinkFigures | None = Field(description="Within a node; null: there is no other device.")
    network_wire: LinkFigures | None = Field(description="Between nodes; null: there is one node.")
    devices_per_node: int = Field(description="Ranks that node_wire joins.")
    reserved_gib: float = Field(description="What is not for tensors: context, libraries, buffers.")
    fragmentation: float = Field(description="What the allocator loses, as a share of what tensors hold.")
    operation_microseconds: float = Field(
        description="To start one operation of the training code, on the host."
    )
    attainable: AttainableShares

    @model_validator(mode="after")
    def _check(self) -> Hardware:
        self.require_positive("memory_gib", "memory_gigabytes_per_second", "devices_per_node")
        self.require_between(0.0, float("inf"), "operation_microseconds", "fragmentation", "reserved_gib")
        if min(self.matrix_teraflops.values(), default=0.0) <= 0:
            raise self.problem(
                "matrix_teraflops", "must name dtypes and positive rates", "give bfloat16: 989"
            )
        return self

    def matrix_rate(self, dtype: str) -> float:
        """Peak FLOP/s of a dtype; raises `FieldError` where the file does not state it."""
        if dtype not in self.matrix_teraflops:
            raise self.problem(
                "matrix_teraflops", f"has no rate for {dtype}", f"add one to {self.name}'s file"
            )
        return 1e12 * self.matrix_teraflops[dtype]

    def link_between(self, ranks: list[int]) -> LinkFigures:
        """The slowest wire that joins `ranks`, which are numbered node by node."""
        nodes = {rank // self.devices_per_node for rank in ranks}
        wire = self.node_wire if len(nodes) == 1 else self.network_wire
        if wire is None:
            place = "within a node" if len(nodes) == 1 else "between nodes"
            raise UserError(
                f"{self.name}: its hardware file states no wire {place}, which {len(ranks)} ranks need"
            )
        return wire

    def needed_bytes(self, peak_bytes: float) -> float:
        """What a rank takes of the device's memory when its tensors hold `peak_bytes` at the most."""
        return peak_bytes * (1 + self.fragmentation) + self.reserved_gib * BYTES_PER_GIB

    def fits(self, peak_bytes: float) -> bool:
        """Whether that is there."""
        return self.needed_bytes(peak_bytes) <= self.memory_gib * BYTES_PER_GIB


def shipped_names() -> list[str]:
    """Names of the hardware files that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_hardware(name_or_path: str | os.PathLike[str]) -> Hardware:
    """A shipped hardware file by its name, or any by its path.

    Raises:
        UserError: there is no such file, or it does not fit; the message names the wrong fields.
    """
    shipped = SHIPPED / f"{name_or_path}.yaml"
    path = shipped if str(name_or_path) in shipped_names() else Path(name_or_path)
    if not path.exists():
        raise UserError(
            f"hardware {str(name_or_path)!r}: neither shipped nor a file; use {', '.join(shipped_names())}, "
            "this-machine, or a path to a file like those"
        )
    try:
        return Hardware.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError("\n".join(problems)) from None
