"""The chunked loss: values, gradients, memory, and the rule that selects it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.costs.output_loss import CHUNK_BYTES, count_chunk_columns, resolve_output_loss
from tests.conftest import ROOT
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.tolerances import assert_near

LENGTH, BATCH, WIDTH, VOCAB = 8, 3, 5, 44
# Neither divides the other: the last chunk of a rank is shorter.
COLUMNS = 7


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states [S, B, H], the weight [V, H], labels [B, S], and gradients of both results."""
    torch.manual_seed(11)
    hidden = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64).to(dtype)
    weight = (3 * torch.randn(VOCAB, WIDTH, dtype=torch.float64)).to(dtype)
    labels = torch.randint(VOCAB, (BATCH, LENGTH))
    labels.view(-1)[:4] = torch.tensor([0, COLUMNS - 1, COLUMNS, VOCAB - 1])
    return hidden, weight, labels, torch.randn(2, BATCH, LENGTH, dtype=torch.float64)


def plain_cross_entropy(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return losses, log-sum-exp, gradients of hidden states and weight, by plain torch in float64."""
    hidden, weight, labels, gradients = inputs(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = torch.einsum("sbh,vh->bsv", hidden, weight)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    log_sum_exp = logits.logsumexp(-1)
    torch.autograd.backward([losses, log_sum_exp], list(gradients))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [losses.detach(), log_sum_exp.detach(), hidden.grad, weight.grad]


def chunked_on_a_rank(parallel: ParallelConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the same of this rank's shards."""
    from sas_megatron.model.output_loss import chunked_cross_entropy

    group = in_layout(parallel).tensor_group
    rank, ranks = group.rank(), group.size()
    hidden, weight, labels, gradients = inputs(dtype)
    if parallel.sequence:
        hidden = hidden.chunk(ranks)[rank]
    hidden = hidden.clone().requires_grad_()
    weight = weight.chunk(ranks)[rank].clone().requires_grad_()
    losses, log_sum_exp = chunked_cross_entropy(
        hidden, weight, labels, group=group, sequence_parallel=parallel.sequence, chunk_columns=COLUMNS
    )
    torch.autograd.backward([losses, log_sum_exp], [gradient.to(losses.dtype) for gradient in gradients])
    assert hidden.grad is not None
    assert weight.grad is not None
    return [losses.detach(), log_sum_exp.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, False), (2, False), (2, True), (4, False), (4, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_equal_a_plain_cross_entropy_in_float64(
    ranks: Any, dtype: torch.dtype, tensor: int, sequence: bool
) -> None:
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    losses, log_sum_exp, hidden, weight = plain_cross_entropy(dtype)
    by_rank = ranks(tensor).run(chunked_on_a_rank, parallel, dtype)
    for part in by_rank:
        assert part[0].dtype == torch.float32
        assert torch.equal(part[0], by_rank[0][0]), "the losses differ between ranks"
        assert_near(part[0], losses, dtype, "losses")
        assert_near(part[1], log_sum_exp, dtype, "log-sum-exp")
        if not sequence:
            assert_near(part[2], hidden, dtype, "gradient of the hidden states")
    if sequence:
        gathered = torch.cat([part[2] for part in by_rank])
        assert_near(gathered, hidden, dtype, "gradient of the hidden states")
    assert_near(torch.cat([part[3] for part in by_rank]), weight, dtype, "gradient of the weight")


def blocks_on_a_rank(dtype: torch.dtype, elements: int) -> list[torch.Tensor]:
    """Return losses without gradients, losses, and the gradients of hidden states and weight."""
    from sas_megatron.model import output_loss

    hidden, weight, labels, (gradient, _) = inputs(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_loss, "BLOCK_ELEMENTS", elements)
        in_evaluation = output_loss.blocked_cross_entropy(hidden, weight, labels)
        losses = output_loss.blocked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
        losses.backward(gradient.to(dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [in_evaluation, losses.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [1, 7 * VOCAB, 1000 * VOCAB])
def test_losses_and_gradients_of_blocks_equal_a_plain_cross_entropy(
    ranks: Any, dtype: torch.dtype, elements: int
) -> None:
    """Blocks of one token, of seven of the 24 tokens, and of all."""
    ((in_evaluation, losses, of_hidden, of_weight),) = ranks(1).run(blocks_on_a_rank, dtype, elements)
    hidden, weight, labels, (gradient, _) = inputs(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = torch.einsum("sbh,vh->bvs", hidden, weight)
    expected = F.cross_entropy(logits, labels, reduction="none")
    expected.backward(gradient)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert losses.dtype == dtype
    assert torch.equal(losses, in_evaluation)
    assert_near(losses, expected.detach(), dtype, "losses")
    assert_near(of_hidden, hidden.grad, dtype, "gradient of the hidden states")
    assert_near(of_weight, weight.grad, dtype, "gradient of the weight")


def loss_of_an_impossible_label() -> float:
    """Return the loss of a label with a probability of 0 in float32."""
    from sas_megatron.model.output_loss import blocked_cross_entropy

    weight = torch.tensor([[500.0], [0.0]], requires_grad=True)
    return float(blocked_cross_entropy(torch.ones(1, 1, 1), weight, torch.tensor([[1]])))


def test_the_loss_of_an_impossible_label_is_finite(ranks: Any) -> None:
    assert ranks(1).run(loss_of_an_impossible_label) == [pytest.approx(500.0)]


class LargestResult(TorchDispatchMode):
    """Records the largest number of elements of a result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def results_and_saved_elements(output_loss: str) -> tuple[int, int, int]:
    """Return T·V, the most elements of a result in a model's pass, and of a saved tensor of the loss."""
    from sas_megatron.model import output_loss as module
    from sas_megatron.model.assembly import build_gpt_chunks

    config = small_config(
        model={"vocab_size": 640, "num_layers": 1, "output_loss": output_loss}, data={"sequence_length": 40}
    )
    in_layout(config.parallel)
    (model,) = build_gpt_chunks(config)
    tokens = torch.zeros(2, 40, dtype=torch.int64)
    saved: list[int] = []
    module.count_chunk_columns = lambda _tokens: 128  # type: ignore[assignment]
    try:
        with (
            LargestResult() as largest,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor
            ),
        ):
            model(tokens, tokens, None, labels=tokens).sum().backward()
    finally:
        module.count_chunk_columns = count_chunk_columns
    return tokens.numel() * config.model.padded_vocab_size, largest.elements, max(saved)


def test_no_tensor_holds_the_logits_of_all_tokens(ranks: Any) -> None:
    ((full_logits, largest, largest_saved),) = ranks(1).run(results_and_saved_elements, "chunked")
    assert largest < full_logits
    assert largest_saved < full_logits
    ((_, largest, largest_saved),) = ranks(1).run(results_and_saved_elements, "full")
    assert largest == largest_saved == full_logits, "the test does not see the logits of the full loss"


def losses_by_mode(z_loss: float) -> list[torch.Tensor]:
    """Return the losses of the full model, and of the chunked one in training and in evaluation."""
    from sas_megatron.model.assembly import build_gpt_chunks

    results = []
    for fields, is_training in (
        ({"output_loss": "full"}, True),
        ({"z_loss": z_loss}, True),
        ({"z_loss": z_loss}, False),
    ):
        config = small_config(model=fields)
        in_layout(config.parallel)
        (model,) = build_gpt_chunks(config, dtype=torch.float64)
        model.train(is_training)
        tokens = torch.arange(24).view(2, 12)
        results.append(model(tokens, tokens, None, labels=tokens.flip(1)).detach().double())
        results.append(model(tokens, tokens, None).detach().logsumexp(-1))
    dist.barrier()
    return results


def test_the_z_loss_is_added_in_training_alone(ranks: Any) -> None:
    (results,) = ranks(1).run(losses_by_mode, 0.5)
    full, log_sum_exp, with_z_loss, _, in_evaluation, _ = results
    assert_near(in_evaluation, full, torch.float32, "losses in evaluation")
    assert_near(with_z_loss - full, 0.5 * log_sum_exp**2, torch.float32, "z-loss")


def test_auto_selects_chunks_if_the_probabilities_exceed_one() -> None:
    """T·V/P·4 bytes of a microbatch; the vocabulary of 45 is padded to 48."""

    def select(**sections: dict[str, Any]) -> str:
        return resolve_output_loss(small_config(**sections))

    length = CHUNK_BYTES // 4 // 2 // 48
    assert select(data={"sequence_length": length}) == "full"
    assert select(data={"sequence_length": length + 1}) == "chunked"
    sharded = {"parallel": {"tensor": 2}, "data": {"sequence_length": length + 1}}
    assert select(**sharded) == "full"
    assert select(**sharded, model={"output_loss": "chunked"}) == "chunked"
    assert select(model={"z_loss": 1e-4}) == "chunked"
    assert resolve_output_loss(load_run_config(ROOT / "configs" / "1.3b" / "mha.yaml")) == "chunked"
    assert resolve_output_loss(load_run_config(ROOT / "configs" / "quickstart_mha.yaml")) == "full"


def test_a_chunk_has_aligned_columns_within_its_size() -> None:
    assert count_chunk_columns(8192) == 8192
    assert count_chunk_columns(8200) == 8064
    assert count_chunk_columns(2**30) == 128


def test_a_z_loss_without_chunks_is_rejected() -> None:
    with pytest.raises(FieldError, match=r"^model.z_loss=0.1: needs the chunked loss; set model.output_loss"):
        small_config(model={"z_loss": 0.1, "output_loss": "full"})
    with pytest.raises(FieldError, match=r"^model.z_loss=-1.0: must be at least 0"):
        small_config(model={"z_loss": -1.0})
