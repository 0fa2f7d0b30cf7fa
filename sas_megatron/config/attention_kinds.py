"""The table of attention kinds: where the classes of each variant are, by name. No torch.

A variant consists of three classes, for its config, its costs and its layer, which `KINDS` names. They are
imported when a config uses the kind: config/ and costs/ import no variant, and reading a config imports no
torch. A variant from another package names the same three classes as entry points (`ENTRY_POINT_GROUP`).
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from typing import Any, Literal, NamedTuple

from sas_megatron.config.errors import FieldError

Part = Literal["config", "costs", "layer"]

# Another package registers the kind `name` by three entry points of this group, `name.config`, `name.costs`
# and `name.layer`. docs/own_attention has an example.
ENTRY_POINT_GROUP = "sas_megatron.attention"


class VariantNames(NamedTuple):
    """The classes of a variant, as `module:class`."""

    config: str
    costs: str
    layer: str


def _variant(folder: str, name: str, costs: str, layer: str) -> VariantNames:
    package = f"sas_megatron.attention.{folder}"
    return VariantNames(f"{package}.config:{name}", f"{package}.costs:{costs}", f"{package}.layer:{layer}")


KINDS: dict[str, VariantNames] = {
    "diff": _variant("diff", "DifferentialAttentionConfig", "DifferentialCosts", "DifferentialSelfAttention"),
    "mha": _variant("gqa", "MultiHeadAttentionConfig", "GroupedQueryCosts", "GroupedQueryAttention"),
    "gqa": _variant("gqa", "GroupedQueryAttentionConfig", "GroupedQueryCosts", "GroupedQueryAttention"),
    "mqa": _variant("gqa", "MultiQueryAttentionConfig", "GroupedQueryCosts", "GroupedQueryAttention"),
    "mfa": _variant("mfa", "FactorizedAttentionConfig", "FactorizedCosts", "FactorizedSelfAttention"),
    "mla": _variant("mla", "LatentAttentionConfig", "LatentCosts", "LatentSelfAttention"),
    "sas": _variant("sas", "SimulatedAttentionConfig", "SimulatedCosts", "SimulatedSelfAttention"),
    "tpa": _variant(
        "tpa", "TensorProductAttentionConfig", "TensorProductCosts", "TensorProductSelfAttention"
    ),
}


def resolve_part(kind: object, part: Part) -> Any:
    """Import one of the three classes of an attention kind. Built-in kinds precede entry points.

    Raises:
        FieldError: The kind is unknown, or its package registers it by the former contract.
    """
    if isinstance(kind, str) and kind in KINDS:
        name: str = getattr(KINDS[kind], part)
    else:
        name = _find_entry_point(kind, part)
    return pkgutil.resolve_name(name)


def _find_entry_point(kind: object, part: Part) -> str:
    """Return the name of a class of another package.

    The metadata of all installed packages is read, which takes long; a sweep builds many configs, so this
    runs for kinds that are not built in only.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    found = points.get(f"{kind}.{part}")
    if found is not None:
        return found.value
    parts = [f"{kind}.{name}" for name in VariantNames._fields]
    registered = next((points[name] for name in (str(kind), *parts) if name in points), None)
    if registered is not None:
        package = registered.dist.name if registered.dist is not None else registered.module
        raise FieldError(
            "attention.kind",
            kind,
            f"is registered by the package {package} as {registered.name}, without {kind}.{part}: a variant "
            f"needs the entry points {', '.join(parts)} in the group {ENTRY_POINT_GROUP}",
            f"install a version of {package} for this contract, or register it as docs/own_attention does",
        )
    names = {*KINDS, *(name.removesuffix(".config") for name in points if name.endswith(".config"))}
    raise FieldError(
        "attention.kind", kind, "is not a known variant", f"use one of {', '.join(sorted(names))}"
    )
