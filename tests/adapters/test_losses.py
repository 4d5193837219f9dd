import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM

from mttl_adapters.losses import labelled_loss, linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_the_chunked_loss_and_its_gradients_are_those_of_torch(chunk, biased):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if biased else None
    targets = torch.randint(0, 11, (7,))
    wanted = cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")
    found = linear_cross_entropy(hidden, weight, bias, targets, chunk)
    torch.testing.assert_close(found, wanted)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    for ours, theirs in zip(
        torch.autograd.grad(2 * found, inputs), torch.autograd.grad(2 * wanted, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_passes():
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 4, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, None, targets, 2), (hidden, weight)
    )


def test_no_labelled_token_is_no_loss():
    hidden = torch.randn(0, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(4, 3), None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


def test_it_is_the_models_own_loss(model, batches):
    batch = batches(1)[0]
    loss, count = labelled_loss(model, batch)
    torch.testing.assert_close(loss / count, model(**batch).loss)


def test_a_model_that_scales_its_logits_is_refused(batches):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            logits_scaling=4.0,
        )
    )
    with pytest.raises(ValueError, match="'logits_scaling'"):
        labelled_loss(model, batches(1)[0])
