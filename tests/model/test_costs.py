"""The counted parameters equal a built model's, and published numbers; counting is fast, without torch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

from sas_megatron.config.attention import parse_attention
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.communication import count_communication_bytes
from sas_megatron.costs.parameters import count_parameters
from tests.conftest import ROOT
from tests.model.one_microbatch import undrawn_weights
from tests.model.small_runs import small_runs, sweep
from tests.model.term_tracing import term_of_name
from tests.rank_pool import in_layout
from tests.run_configs import SHIPPED
from tests.selection import exhaustive


@contextlib.contextmanager
def _without_storage() -> Iterator[None]:
    """Build modules on torch's meta device, which has shapes but no values."""
    device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment]
    try:
        with undrawn_weights():
            yield
    finally:
        torch.cuda.current_device = device


def _built_parameters(config: RunConfig) -> dict[str, int]:
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(ParallelConfig())
    with _without_storage():
        (model,) = build_gpt_chunks(config)
    terms: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta", name
        terms[term_of_name(name)] += parameter.numel()
    return dict(terms)


def without_zeros(terms: dict[str, Any]) -> dict[str, Any]:
    return {term: count for term, count in terms.items() if count}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_parameters_of_a_shipped_config_equal_those_of_the_built_model(ranks: Any, path: Any) -> None:
    config = load_run_config(path, ["parallel.tensor=1", "parallel.sequence=false"])
    assert ranks(1).run(_built_parameters, config) == [without_zeros(count_parameters(config))]


@sweep(60)
@given(config=small_runs())
def test_parameters_of_any_config_equal_those_of_the_built_model(ranks: Any, config: RunConfig) -> None:
    (built,) = ranks(1).run(_built_parameters, config)
    assert built == without_zeros(count_parameters(config))


# The paper's d, h, d_h, d_h^R, d_c, d_c'.
PUBLISHED = {
    "DeepSeek-V2": (5120, 128, 128, 64, 512, 1536),
    "DeepSeek-V2-Lite": (2048, 16, 128, 64, 512, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_latent_attention_has_the_published_number_of_parameters(name: str) -> None:
    hidden, heads, width, rotary, latent, query_latent = PUBLISHED[name]
    attention = parse_attention(
        {
            "kind": "mla",
            "num_heads": heads,
            "head_dim": width,
            "rotary_head_dim": rotary,
            "kv_lora_rank": latent,
            "query_lora_rank": query_latent,
        }
    )
    queries = heads * width + heads * rotary
    expected = (
        (hidden * queries if query_latent is None else query_latent * (hidden + queries))
        + latent * (hidden + 2 * heads * width)
        + hidden * (heads * width + rotary)
    )
    costs = build_attention_costs(attention)
    counted = costs.count_parameters(hidden, linear_bias=False)
    assert counted.pop("latent_norms") == latent + (query_latent or 0)
    assert sum(counted.values()) == expected
    assert sum(costs.count_kv_cache_elements().values()) == 576  # 4.5·d_h, table 1 of the paper


SECONDS = 1.0


@exhaustive  # also slower on a busy machine
def test_a_thousand_counts_take_less_than_a_second() -> None:
    layout = ["model.num_layers=32", "parallel.tensor=4", "parallel.pipeline=2", "optimizer.distributed=true"]
    config = load_run_config(ROOT / "configs" / "125m" / "sas.yaml", layout)
    # Processor time, which does not depend on other processes.
    start = time.process_time()
    for _ in range(1000):
        count_communication_bytes(config, world_size=16)
    assert time.process_time() - start < SECONDS


def test_counting_imports_no_torch() -> None:
    script = (
        "import sys\n"
        "from sas_megatron.config.loading import load_run_config\n"
        "from sas_megatron.costs.communication import count_communication_bytes\n"
        "for path in sys.argv[1:]:\n"
        "    config = load_run_config(path, ['parallel.tensor=2'])\n"
        "    counted = count_communication_bytes(config, world_size=config.parallel.model_size)\n"
        "    assert counted['tensor'], path\n"
        "    assert not {'torch', 'megatron'} & set(sys.modules), path\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *SHIPPED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
