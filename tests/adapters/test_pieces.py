import pytest
import torch

from mttl_adapters.kernels import pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_add_up_exactly(dtype):
    numbers = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    numbers = (numbers * 10 ** torch.linspace(-4, 4, 40)).to(dtype)
    numbers[0, :3] = torch.tensor([torch.finfo(dtype).max, 0.0, -1.0])
    found = pieces.split(numbers)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double().sum(0), numbers.double())


def test_products_of_pieces_are_those_of_float32():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 600, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(20, 600, generator=generator).to(dtype)
        found = pieces.product(x, pieces.split(keys)).double()
        right = x.double() @ keys.double().T
        assert (found - right).abs().max() <= 2**-22 * (
            x.double().abs() @ keys.double().abs().T
        ).max()
