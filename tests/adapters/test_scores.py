import pytest
import torch
from torch import Tensor

from mttl_adapters import kernels
from mttl_adapters.fixed_keys import Fixed
from mttl_adapters.scores import SCREENED_KEYS, Keys, top_k


@pytest.fixture(params=["torch", "cpu"])
def kernel(request):
    if request.param == "cpu" and kernels.missing():
        pytest.skip(kernels.missing())
    with kernels.using(request.param):
        yield request.param


def best(x: Tensor, keys: Tensor, k: int, absolute: bool) -> torch.return_types.topk:
    """In full, in float64."""
    scores = x.double() @ keys.double().T
    return (scores.abs() if absolute else scores).topk(min(k, len(keys)), dim=1)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 64])
@pytest.mark.parametrize(
    ("sizes", "features"), [([3], 8), ([130, 7, 64], 33), ([256], 576), ([16, 200], 1)]
)
def test_every_set_has_its_best_in_order(kernel, sizes, features, k, absolute):
    sets = [torch.randn(size, features) for size in sizes]
    x = torch.randn(29, features)
    for keys, found in zip(sets, top_k(x, Keys(sets), k, absolute=absolute), strict=True):
        expected = best(x, keys, k, absolute)
        torch.testing.assert_close(found.values.double(), expected.values, atol=1e-4, rtol=1e-5)
        scores = x.double() @ keys.double().T
        named = (scores.abs() if absolute else scores).gather(1, found.indices)
        torch.testing.assert_close(named, expected.values, atol=1e-4, rtol=1e-5)
        assert all(len(set(line)) == len(line) for line in found.indices.tolist())


@pytest.mark.parametrize("k", [2, 7, 64])
@pytest.mark.parametrize("every", [1, 16, 64])
def test_the_best_may_lie_side_by_side_or_at_any_distance(kernel, k, every):
    """The screen compares lots of keys, one in 64: the best may share one or be one of each."""
    generator = torch.Generator().manual_seed(k + every)
    x, keys = (torch.randn(n, 40, generator=generator) for n in (29, 64 * 8))
    keys[::every] *= 20
    (found,) = top_k(x, Keys([keys]), k, absolute=True)
    assert torch.equal(found.indices.sort(1).values, best(x, keys, k, True).indices.sort(1).values)


@pytest.mark.parametrize("gap", [2**-5, 2**-7, 2**-9, 2**-11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_ties_that_bfloat16_cannot_tell_apart_are_told_apart(kernel, gap, dtype):
    """Keys a hair apart: the screen orders them at random, the answer must not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 576, generator=generator).to(dtype)
    direction = torch.nn.functional.normalize(torch.randn(576, generator=generator), dim=0)
    near = torch.randn(SCREENED_KEYS + 9, 576, generator=generator) * gap / 24
    keys = direction + near
    (found,) = top_k(x, Keys([keys]), 2, absolute=True)
    expected = best(x, keys, 3, absolute=True)
    clear = expected.values[:, 1] - expected.values[:, 2] > 1e-6 * x.double().norm(dim=1)
    assert clear.sum() > 8
    assert (found.indices.sort(1).values == expected.indices[:, :2].sort(1).values)[clear].all()


def test_adversarial_rounding_does_not_fool_the_screen(kernel):
    """Entries halfway between two bfloat16 numbers, rounded against the best key."""
    n, e = 512, 256
    x = torch.full((4, n), 1.0 + 2**-8)  # rounds down to 1, as far as can be
    keys = torch.full((e, n), 1.0 + 2**-7)  # exact: screened at 1.0078 n
    keys[77] += 2**-8 - 2**-9 * 0.98  # a little larger; rounds down
    keys[99] = 1.0 + 2**-7 + 2**-9 * 1.01
    keys[100] = keys[99]
    (found,) = top_k(x, Keys([keys]), 3)
    assert {*best(x, keys, 3, False).indices[0].tolist()} == {77, 99, 100}
    assert all(set(line) == {77, 99, 100} for line in found.indices.tolist())


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-3, 1e18, 3e38])
def test_scales_at_the_ends_of_float32_keep_the_order(kernel, scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 64, generator=generator).clamp(-1, 1) * scale
    keys = torch.randn(200, 64, generator=generator) / (1 if scale < 1e18 else 1e3)
    (found,) = top_k(x, Keys([keys]), 2, absolute=True)
    expected = best(x, keys, 2, True)
    clear = expected.values < 3e38
    if scale > 1e-30:  # what float32 itself can tell
        assert (found.indices == expected.indices)[clear].all()


def test_massive_activations_cost_time_but_not_exactness(kernel):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 576, generator=generator)
    x[:, 3] = 3001.7
    keys = torch.randn(256, 576, generator=generator)
    keys[:, 3] = 0.001 * torch.randn(256, generator=generator)
    (found,) = top_k(x, Keys([keys]), 2, absolute=True)
    expected = best(x, keys, 3, True)
    clear = expected.values[:, 1] - expected.values[:, 2] > 0.01
    assert (found.indices.sort(1).values == expected.indices[:, :2].sort(1).values)[clear].all()


def test_infinite_and_missing_numbers_come_first_as_in_torch(kernel):
    keys = torch.randn(200, 16).abs()
    x = torch.ones(3, 16)
    keys[150] = torch.nan
    keys[151] = torch.inf
    (found,) = top_k(x, Keys([keys]), 2)
    assert found.indices.tolist() == [[150, 151]] * 3
    x[1, 0] = torch.nan
    (found,) = top_k(x, Keys([torch.randn(200, 16)]), 2)
    assert found.values[1].isnan().all()
    assert found.values[0].isfinite().all()


@pytest.mark.skipif(kernels.missing() is not None, reason="of the compiled kernel alone")
def test_equal_scores_go_to_the_lower_index_and_the_batch_does_not_matter():
    keys = torch.randn(5, 40).repeat(60, 1)
    x = torch.randn(33, 40)
    with kernels.using("cpu"):
        (whole,) = top_k(x, Keys([keys]), 3, absolute=True)
        assert (whole.indices.diff(dim=1) == 5).all()
        for token in (0, 7, 32):
            (alone,) = top_k(x[token : token + 1], Keys([keys]), 3, absolute=True)
            assert torch.equal(alone.indices[0], whole.indices[token])
            torch.testing.assert_close(alone.values[0], whole.values[token], rtol=1e-6, atol=1e-6)


def test_keys_changed_in_place_are_seen(kernel):
    vectors = torch.randn(SCREENED_KEYS, 24)
    other = torch.randn(4, 24)
    keys = Keys([vectors, other])
    x = torch.randn(3, 24)
    top_k(x, keys, 1)
    vectors[5] = 100 * x[1]
    (found, _) = top_k(x, keys, 1)
    assert found.indices[1].item() == 5


def test_keys_are_few_or_none(kernel):
    few, none = top_k(torch.randn(3, 8), Keys([torch.randn(2, 8), torch.zeros(0, 8)]), 4)
    assert few.indices.shape == (3, 2)
    assert none.values.shape == (3, 0)
    (empty,) = top_k(torch.zeros(0, 8), Keys(torch.randn(200, 8)), 4)
    assert empty.indices.shape == (0, 4)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("e", [6, SCREENED_KEYS])
def test_gradients_go_through_the_chosen_scores(kernel, e, absolute):
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(e, 10, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, keys: Tensor) -> Tensor:
        return top_k(x, Keys(keys), 2, absolute=absolute)[0].values

    assert torch.autograd.gradcheck(function, (x, keys), fast_mode=True)
    single = x.detach().float().requires_grad_()
    function(single, keys.detach().float()).sum().backward()
    function(x, keys).sum().backward()
    torch.testing.assert_close(single.grad, x.grad.float())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 3\); these keys want \(t, 8\)"):
        top_k(torch.zeros(2, 3), Keys(torch.zeros(4, 8)), 1)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 8\), \(4, 9\)\]"):
        Keys([torch.zeros(4, 8), torch.zeros(4, 9)])
    with pytest.raises(ValueError, match="k is 0"):
        top_k(torch.zeros(2, 8), Keys(torch.zeros(4, 8)), 0)


def any_bits(rows: int, features: int) -> Tensor:
    """Float32 of all kinds: infinite, missing, under the normal ones, halfway between bfloat16."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (rows, features), generator=generator)
    bits[0] = bits[0] & ~0xFFFF | 0x8000
    bits[1] = bits[1] & 0x807FFFFF
    bits[2], bits[3] = 0x7FFFFFFF, 0x7F7FFFFF
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("features", [1, 33, 576])
def test_halves_of_keys_are_the_keys_bit_for_bit_and_take_no_more(features):
    if kernels.missing() or not kernels.cpu.has_screen():
        pytest.skip("no screen on this machine")
    keys = any_bits(70, features)
    halves = kernels.cpu.split_keys(keys)
    joined = kernels.cpu.join_keys(halves, features)
    assert torch.equal(joined.view(torch.int32), keys.view(torch.int32))
    width = -(-features // 32) * 32
    assert halves.upper.nbytes + halves.lower.nbytes == 70 * width * 4
    assert halves.norms.nbytes == 2 * 80 * 4


@pytest.mark.parametrize("split", [False, True])
def test_keys_that_others_follow_are_not_copied_while_there_is_room(kernel, split):
    given = torch.randn(SCREENED_KEYS + 40, 33)
    fixed, x = Fixed(given[:SCREENED_KEYS].clone()), torch.randn(9, 33)

    def check(keys, n: int) -> None:
        assert torch.equal(keys.copied(), given[:n])
        (found,), (expected,) = top_k(x, Keys([keys]), 2), top_k(x, Keys(given[:n].clone()), 2)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.values, expected.values)

    if split:
        check(fixed, SCREENED_KEYS)
    places = set()
    versions = [fixed]
    for n in range(SCREENED_KEYS, len(given)):
        versions.append(versions[-1].extended(given[n : n + 1]))
        places.add((versions[-1]._halves or (versions[-1]._keys,))[0].buffer.data_ptr())
    assert len(places) <= 4  # copies of all that was there
    for more, keys in enumerate(versions[:: 10 if split else 40]):
        check(keys, SCREENED_KEYS + more * (10 if split else 40))
    branch = fixed.extended(-given[-1:])  # after another took the room
    assert torch.equal(branch.copied()[-1], -given[-1])
    check(versions[1], SCREENED_KEYS + 1)


def test_keys_that_never_change_are_in_memory_once_and_score_the_same(kernel):
    given = [torch.randn(SCREENED_KEYS, 64), torch.randn(100, 64)]
    x = torch.randn(9, 64)
    fixed = [Fixed(keys.clone()) for keys in given]
    found, expected = top_k(x, Keys(fixed), 3), top_k(x, Keys(given), 3)
    for one, other, keys, before in zip(found, expected, fixed, given, strict=True):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.indices, other.indices)
        assert keys.nbytes <= before.nbytes + 2 * 4 * 128  # and the norms
        assert torch.equal(keys.copied(), before)
    with kernels.using("torch"):
        for one, other in zip(top_k(x, Keys(fixed), 3), expected, strict=True):
            torch.testing.assert_close(one.values, other.values)
            assert torch.equal(one.indices, other.indices)
    x.requires_grad_()
    values = top_k(x, Keys(fixed), 1)[0].values
    values.sum().backward()
    torch.testing.assert_close(x.grad, given[0][found[0].indices[:, 0]])
