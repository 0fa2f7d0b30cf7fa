"""Hardware files: peak figures of one device and its links, and the shares of them that training attains."""

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
    """Bandwidth and latency of a link between two devices."""

    section_name: ClassVar[str] = "link"

    gigabytes_per_second: float = Field(
        description="Bandwidth of one device in one direction; 1 GB is 10⁹ bytes."
    )
    latency_microseconds: float = Field(description="Latency of one message between neighbours.")

    @model_validator(mode="after")
    def _check(self) -> LinkFigures:
        self.require_positive("gigabytes_per_second", "latency_microseconds")
        return self


class AttainableShares(Section):
    """Shares of the peak figures that training attains."""

    section_name: ClassVar[str] = "attainable"
    former_names: ClassVar[dict[str, str]] = {"wire": "link"}

    matrix: float = Field(description="Share of matrix_teraflops in matrix products.")
    convolution: float = Field(description="Share of matrix_teraflops in convolutions over few channels.")
    attention: float = Field(
        description="Share of matrix_teraflops in fused attention, which skips the masked half of the scores."
    )
    memory: float = Field(description="Share of memory_gigabytes_per_second.")
    link: float = Field(description="Share of gigabytes_per_second of both links.")

    @model_validator(mode="after")
    def _check(self) -> AttainableShares:
        self.require_positive("matrix", "convolution", "attention", "memory", "link")
        return self


class Hardware(Section):
    """One device and its links to other devices."""

    section_name: ClassVar[str] = "hardware"
    former_names: ClassVar[dict[str, str]] = {"node_wire": "node_link", "network_wire": "network_link"}

    name: str = Field(description="Name of the device, for reports.")
    device: Literal["gpu", "cpu"] = Field(description="Selects the attention kernels that are estimated.")
    memory_gib: float = Field(description="Memory of one device; on CPU, of one process.")
    matrix_teraflops: dict[str, float] = Field(description="Dense peak by dtype, 10¹² FLOP/s.")
    memory_gigabytes_per_second: float = Field(description="Peak memory bandwidth, reads and writes added.")
    node_link: LinkFigures | None = Field(description="Link within a node; null for a single device.")
    network_link: LinkFigures | None = Field(description="Link between nodes; null for a single node.")
    devices_per_node: int = Field(description="Ranks that node_link connects.")
    reserved_gib: float = Field(description="Memory reserved for the context, libraries and buffers.")
    fragmentation: float = Field(
        description="Memory lost by the allocator, as a share of the memory of all tensors."
    )
    operation_microseconds: float = Field(
        description="Time on the host to launch one operation of the training code."
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
        """Return the peak FLOP/s of a dtype.

        Raises:
            FieldError: The hardware file has no rate for the dtype.
        """
        if dtype not in self.matrix_teraflops:
            raise self.problem(
                "matrix_teraflops", f"has no rate for {dtype}", f"add it to the file of {self.name}"
            )
        return 1e12 * self.matrix_teraflops[dtype]

    def link_between(self, ranks: list[int]) -> LinkFigures:
        """Return the slowest link between `ranks`, which are numbered node by node.

        Raises:
            UserError: The hardware file has no such link.
        """
        nodes = {rank // self.devices_per_node for rank in ranks}
        field = "node_link" if len(nodes) == 1 else "network_link"
        link: LinkFigures | None = getattr(self, field)
        if link is None:
            raise self.problem(
                field, f"must be given for {len(ranks)} ranks", f"add it to the file of {self.name}"
            )
        return link

    def needed_bytes(self, peak_bytes: float) -> float:
        """Return the device memory that a rank needs if its tensors take `peak_bytes` at their peak."""
        return peak_bytes * (1 + self.fragmentation) + self.reserved_gib * BYTES_PER_GIB

    def fits(self, peak_bytes: float) -> bool:
        """Return whether the device has that much memory."""
        return self.needed_bytes(peak_bytes) <= self.memory_gib * BYTES_PER_GIB


def shipped_names() -> list[str]:
    """Return the names of the hardware files that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_hardware(name_or_path: str | os.PathLike[str]) -> Hardware:
    """Load a shipped hardware file by its name, or another one by its path.

    Raises:
        UserError: The file does not exist, or has wrong fields, which the message names.
    """
    shipped = SHIPPED / f"{name_or_path}.yaml"
    path = shipped if str(name_or_path) in shipped_names() else Path(name_or_path)
    if not path.exists():
        raise UserError(
            f"hardware {str(name_or_path)!r}: is neither a shipped name nor a file; "
            f"use {', '.join(shipped_names())}, this-machine, or the path of a hardware file"
        )
    try:
        return Hardware.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError("\n".join(problems)) from None


def find_peak_flops(gpu: str, dtype: str) -> float | None:
    """Return the dense peak in FLOP/s of a GPU that has a shipped hardware file; None for any other GPU.

    Args:
        gpu: The name that `torch.cuda.get_device_name` returns.
        dtype: The dtype of the matrix products; without a rate in the hardware file, the result is None.
    """
    for name in shipped_names():
        if name.upper() in gpu.upper():
            teraflops = load_hardware(name).matrix_teraflops.get(dtype)
            return None if teraflops is None else 1e12 * teraflops
    return None
