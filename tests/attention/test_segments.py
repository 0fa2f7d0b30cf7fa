"""Segments and windows: every variant computes its definition for each document, in every layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sas_megatron.attention import backend as backend_module
from sas_megatron.attention.backend import AttentionBackend
from sas_megatron.costs.attention_backend import CHUNK_TOKENS
from sas_megatron.data.segments import Segments, segment_lengths
from tests import small_attentions as small
from tests.attention import definitions, layer_case
from tests.attention.layer_case import LayerCase, drawn
from tests.attention.test_modifiers import KINDS
from tests.selection import cases
from tests.tolerances import assert_near

# A document that is longer than the sample; documents of one token; a boundary after the fourth token, which
# is the end of a chunk of two and of four context ranks, and boundaries within chunks.
SEGMENTS = ((8,), (1, 3, 4), (2, 5, 1))
LAYOUTS: dict[str, tuple[int, int, bool]] = {
    "alone": (1, 1, False),
    "P=2": (2, 1, False),
    "P=2 sequence": (2, 1, True),
    "C=2": (1, 2, False),
    "C=4": (1, 4, False),
    "P=2 C=2 sequence": (2, 2, True),
}
MODIFIED = {f"{name}, modified": {**KINDS[name], **small.MODIFIERS} for name in ("gqa", "mla", "sas gather")}
WINDOWED = {f"{name}, window": {**fields, "window_size": 3} for name, fields in {**KINDS, **MODIFIED}.items()}
ATTENTIONS: dict[str, small.Attention] = {**KINDS, **MODIFIED, **WINDOWED}
CASES = list(itertools.product(LAYOUTS, ATTENTIONS))
# Every attention in one layout, and every layout with several attentions.
DEFAULT = [(list(LAYOUTS)[number % len(LAYOUTS)], name) for number, name in enumerate(ATTENTIONS)]


@pytest.mark.parametrize(("layout", "name"), cases(CASES, default=sorted(DEFAULT)))
def test_a_layer_computes_the_definition_for_each_document(ranks: Any, layout: str, name: str) -> None:
    tensor, context, sequence = LAYOUTS[layout]
    case = LayerCase.of(sequence_parallel=sequence, segments=SEGMENTS, **ATTENTIONS[name])
    expected = layer_case.by_definition(case.attention, case.dtype, SEGMENTS)
    by_rank = ranks(tensor * context).run(layer_case.on_rank, case, tensor, context)
    if context > 1:
        actual = layer_case.joined_over_context(case, by_rank, tensor=tensor, context=context)
    else:
        actual = layer_case.joined(case, by_rank)
    actual.assert_near(expected, case.dtype)


LENGTHS = ((1, 90, 2 * CHUNK_TOKENS, 71), (290,))


def attended(attend: Any, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the result of `attend` [S, B, M, D], and the gradients of query, key and value."""
    context = attend(*heads)
    gradient = drawn("gradient", context.shape, torch.float64)
    return [context, *torch.autograd.grad(context, heads, gradient)]


def definition(heads: list[torch.Tensor], lengths: Any, window: int | None) -> torch.Tensor:
    """Return the attention of one document after another, [S, B, M, D]."""
    samples = [
        torch.cat(
            [
                definitions.attend(*document, window=window)
                for document in zip(*(part[:, index, None].split(sizes) for part in heads), strict=True)
            ]
        )
        for index, sizes in enumerate(lengths)
    ]
    return torch.cat(samples, dim=1)


def by_backend(name: Any, heads: list[torch.Tensor], segments: Any, window: int | None) -> torch.Tensor:
    """Return the result of a backend, [S, B, M, D]."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in heads)
    backend = AttentionBackend(name, scale=query.shape[-1] ** -0.5)
    context = backend.attend(query, key, value, segments=segments, window=window)
    return context.permute(2, 0, 1, 3)[..., : value.shape[-1]]


def small_heads(lengths: Any, groups: int) -> list[torch.Tensor]:
    """Return query [S, B, 4, 8], key [S, B, G, 8] and value [S, B, G, 5]."""
    size = (sum(lengths[0]), len(lengths))
    shapes = {"query": (*size, 4, 8), "key": (*size, groups, 8), "value": (*size, groups, 5)}
    return [drawn(name, shape, torch.float64, scale=1.0).requires_grad_() for name, shape in shapes.items()]


def segments_of(lengths: Any) -> Segments:
    positions = [torch.cat([torch.arange(length) for length in sizes]) for sizes in lengths]
    return Segments.build(lengths, torch.stack(positions))


WHOLE = ((290,), (290,))
BACKENDS = [("auto", 4), ("fused", 4), ("fused", 2), ("unfused", 2)]
WINDOWS = [None, 1, 3, CHUNK_TOKENS, CHUNK_TOKENS + 1, 289]
BACKEND_CASES = [
    (*backend, lengths, window)
    for backend, lengths, window in itertools.product(BACKENDS, (LENGTHS, WHOLE), WINDOWS)
]
# Windows of one key, and wider than a block; whole samples have no boundaries within.
DEFAULT_BACKEND_CASES = [
    case for case in BACKEND_CASES if case[3] in ((None, 1, CHUNK_TOKENS + 1) if case[2] is LENGTHS else (3,))
]


@pytest.mark.parametrize(
    ("name", "groups", "lengths", "window"), cases(BACKEND_CASES, default=DEFAULT_BACKEND_CASES)
)
def test_every_backend_attends_to_the_document_and_the_window(
    name: str, groups: int, lengths: Any, window: int | None
) -> None:
    heads = small_heads(lengths, groups)
    expected = attended(lambda *parts: definition(list(parts), lengths, window), heads)
    segments = segments_of(lengths)
    actual = attended(lambda *parts: by_backend(name, list(parts), segments, window), heads)
    for part, mine, theirs in zip(("context", "query", "key", "value"), actual, expected, strict=True):
        assert_near(mine, theirs, torch.float64, part)


def packed_definition(query: Any, key: Any, value: Any, ends: Any, *others: Any, **options: Any) -> Any:
    """Compute torch's variable-length attention by its documentation: T tokens, of several segments."""
    key_ends, longest, _ = others
    assert torch.equal(ends, key_ends)
    assert longest == max((ends[1:] - ends[:-1]).tolist())
    assert query.shape[-1] == value.shape[-1] == key.shape[-1]
    assert query.shape[-1] % 8 == 0
    left, right = options["window_size"]
    assert right == 0
    lengths = [(ends[1:] - ends[:-1]).tolist()]
    scale = options["scale"] * query.shape[-1] ** 0.5
    heads = [part[:, None] for part in (scale * query, key, value)]
    return definition(heads, lengths, None if left < 0 else left + 1)[:, 0]


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [LENGTHS, WHOLE], ids=["documents", "whole samples"])
def test_variable_length_attention_is_called_as_torch_documents_it(
    lengths: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that a GPU makes; its kernel is replaced by the definition."""
    heads = small_heads(lengths, 2)
    heads = [torch.cat([part, part[..., :1]], dim=-1).detach().requires_grad_() for part in heads]
    expected = attended(lambda *parts: definition(list(parts), lengths, window), heads)
    calls = []

    def kernel(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return packed_definition(*arguments, **options)

    monkeypatch.setattr(backend_module, "varlen_attn", kernel)
    monkeypatch.setattr(AttentionBackend, "_uses_varlen", lambda *_, **__: True)
    segments = segments_of(lengths)
    actual = attended(lambda *parts: by_backend("auto", list(parts), segments, window), heads)
    assert len(calls) == (0 if window is None and len(lengths[0]) == 1 else 1)
    for part, mine, theirs in zip(("context", "query", "key", "value"), actual, expected, strict=True):
        assert_near(mine, theirs, torch.float64, part)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length attention needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("groups", [2, 4])
def test_variable_length_attention_of_a_gpu_computes_the_definition(groups: int, window: int | None) -> None:
    heads = small_heads(LENGTHS, groups)
    expected = attended(lambda *parts: definition(list(parts), LENGTHS, window), heads)
    on_gpu = [part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in heads]
    segments = segments_of(LENGTHS)
    segments.cu_seqlens_q = segments.cu_seqlens_q.cuda()
    actual = attended(lambda *parts: by_backend("auto", list(parts), segments, window).cpu(), on_gpu)
    for part, mine, theirs in zip(("context", "query", "key", "value"), actual, expected, strict=True):
        assert_near(mine.cpu(), theirs, torch.bfloat16, part)


def test_segments_are_read_from_positions_that_restart() -> None:
    positions = torch.tensor([0, 0, 1, 2, 0, 1, 0])
    assert segment_lengths(positions) == [1, 3, 2, 1]
    assert segment_lengths(torch.arange(7)) == [7]
    built = Segments.build([[1, 3, 2, 1], [7]], torch.stack([positions, torch.arange(7)]))
    assert built.cu_seqlens_q.tolist() == [0, 1, 4, 6, 7, 14]
    assert (built.longest, built.max_tokens, built.are_whole_samples) == (7, 7, False)
    assert built.positions.T.tolist() == [positions.tolist(), list(range(7))]
