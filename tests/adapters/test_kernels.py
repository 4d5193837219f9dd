"""The compiled kernel and plain torch against a slow loop, at sizes where blocks and rests meet."""

import functools
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mttl_adapters import kernels
from mttl_adapters.bank import Bank
from mttl_adapters.chosen import NONE, Chosen
from mttl_adapters.kernels import build

needs_compiler = pytest.mark.skipif(
    kernels.missing() is not None, reason=f"no compiled kernel: {kernels.missing()}"
)


@pytest.fixture(params=["torch", "cpu"])
def kernel(request):
    if request.param == "cpu" and kernels.missing():
        pytest.skip(kernels.missing())
    with kernels.using(request.param):
        yield request.param


def make_bank(ranks, features=(45, 331), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    i, o = features
    return Bank.from_factors(
        [
            (
                torch.randn(rank, i, generator=generator).to(dtype) / 8,
                torch.randn(o, rank, generator=generator).to(dtype) / 8,
                0.5 + 0.25 * index,
            )
            for index, rank in enumerate(ranks)
        ]
    )


def make_chosen(tokens, experts, k, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    picked = torch.rand(tokens, experts, generator=generator).topk(k, dim=1).indices
    picked[torch.rand(tokens, k, generator=generator) < 0.1] = NONE
    return Chosen(picked, torch.rand(tokens, k, generator=generator).to(dtype) - 0.25)


def slow_sum(bank: Bank, x: Tensor, chosen: Chosen) -> Tensor:
    """One pair of token and expert at a time, in float64."""
    chosen = chosen.each()
    factors = list(bank.factors())
    out = torch.zeros(x.shape[0], bank.out_features, dtype=torch.float64)
    for token, place in itertools.product(*map(range, chosen.experts.shape)):
        expert = int(chosen.experts[token, place])
        if expert != NONE:
            a, b, scaling = factors[expert]
            update = b.double() @ (a.double() @ x[token].double())
            out[token] += float(chosen.weights[token, place]) * scaling * update
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("features", [(45, 331), (64, 256), (3, 2), (600, 80)])
def test_mixed_ranks_at_odd_sizes_equal_the_slow_loop(kernel, features, tokens, threads):
    bank = make_bank([4, 0, 16, 1, 7, 33], features)
    x = torch.randn(tokens, features[0], generator=torch.Generator().manual_seed(3))
    chosen = make_chosen(tokens, 6, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = bank.apply_grouped(x, chosen)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), slow_sum(bank, x, chosen), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_rows_of_named_experts_equal_the_slow_loop(kernel, tokens, k):
    bank = make_bank([4, 8, 0, 2])
    experts = torch.tensor([[1, 0, 3], [NONE, 2, 1], [3, 3, NONE]])[:, :k]
    chosen = Chosen.for_rows(experts, tokens, torch.rand(3, k))
    x = torch.randn(3 * tokens, bank.in_features)
    torch.testing.assert_close(
        bank.apply(x, chosen).double(), slow_sum(bank, x, chosen), atol=2e-5, rtol=1e-5
    )


def test_all_tokens_to_one_expert_and_one_expert_twice_for_a_token(kernel):
    bank = make_bank([8, 4])
    x = torch.randn(150, bank.in_features)
    chosen = Chosen(torch.tensor([[1, 1]]).expand(150, 2), torch.rand(150, 2))
    torch.testing.assert_close(
        bank.apply_grouped(x, chosen).double(), slow_sum(bank, x, chosen), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_is_added_to_in_place_and_rounded_once(kernel, dtype, bank_dtype):
    bank = make_bank([4, 16, 1, 9], dtype=bank_dtype)
    x = torch.randn(70, bank.in_features).to(dtype)
    chosen = make_chosen(70, 4, 2)
    output = torch.randn(70, bank.out_features).to(dtype)
    expected = output.double() + slow_sum(bank, x, chosen)
    given = output.clone()
    assert bank.add_to(given, x, chosen) is given
    if dtype == torch.float32:  # bfloat16 factors are read as they are
        torch.testing.assert_close(given.double(), expected, atol=2e-5, rtol=1e-5)
    elif bank_dtype == torch.float32 or kernel == "cpu":  # half a step of bfloat16, once
        torch.testing.assert_close(given.double(), expected, atol=2e-5, rtol=2**-8)
    else:  # plain torch rounds what is in between to bfloat16 as well
        assert (given.double() - expected).norm() < 0.01 * expected.norm()


def test_outputs_that_want_gradients_are_left_as_they_are(kernel):
    bank, chosen = make_bank([4, 2]), make_chosen(6, 2, 1)
    x = torch.randn(6, bank.in_features, requires_grad=True)
    output = torch.zeros(6, bank.out_features)
    added = bank.add_to(output, x, chosen)
    assert added is not output
    assert output.eq(0).all()
    added.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("part", ["columns", "rows", "half"])
def test_views_and_other_dtypes_are_read_right(kernel, part):
    bank, chosen = make_bank([4, 2, 3]), make_chosen(9, 3, 2)
    i = bank.in_features
    x = {
        "columns": torch.randn(9, 3 * i)[:, i : 2 * i],
        "rows": torch.randn(i, 9).T,
        "half": torch.randn(9, i).half(),
    }[part]
    torch.testing.assert_close(
        bank.apply_grouped(x, chosen).double(), slow_sum(bank, x, chosen), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 4])
def test_gradcheck_in_float64(kernel, tokens):
    chosen = make_chosen(4, 4, 2, torch.float64)
    if tokens > 1:
        chosen = Chosen(chosen.experts[:1], chosen.weights[:1], tokens)
    ranks = [3, 0, 1, 5]
    a = [torch.randn(r, 7, dtype=torch.float64, requires_grad=True) for r in ranks]
    b = [torch.randn(9, r, dtype=torch.float64, requires_grad=True) for r in ranks]
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weights = chosen.weights.clone().requires_grad_()

    def function(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        pairs = zip(factors[:4], factors[4:], [0.5, 1.0, 2.0, 0.25], strict=True)
        bank = Bank.from_factors(list(pairs))
        return bank.apply_grouped(x, Chosen(chosen.experts, weights, chosen.tokens))

    assert torch.autograd.gradcheck(function, (x, weights, *a, *b))


def test_an_index_beyond_the_bank_is_an_error_and_reads_nothing(kernel):
    bank = make_bank([2, 2])
    chosen = Chosen(torch.tensor([[2]]), torch.ones(1, 1))
    with pytest.raises(IndexError):
        bank.apply_grouped(torch.zeros(1, bank.in_features), chosen)


def test_appended_replaced_and_removed_experts(kernel):
    whole = make_bank([3, 5, 2, 4])
    factors = list(whole.factors())
    bank = Bank.from_factors(factors[:2]).append(*factors[2])
    grown = bank.append(*factors[3])
    assert (len(bank), len(grown)) == (3, 4)
    x, chosen = torch.randn(30, whole.in_features), make_chosen(30, 4, 2)
    torch.testing.assert_close(grown.apply_grouped(x, chosen), whole.apply_grouped(x, chosen))
    torch.testing.assert_close(grown.a, whole.a, rtol=0, atol=0)
    torch.testing.assert_close(grown.b, whole.b, rtol=0, atol=0)

    changed = grown.replace(-2, *factors[0]).remove(1)
    expected = Bank.from_factors([factors[0], factors[0], factors[3]])
    assert changed.ranks == expected.ranks
    chosen = make_chosen(30, 3, 2)
    torch.testing.assert_close(
        changed.apply_grouped(x, chosen), expected.apply_grouped(x, chosen), rtol=1e-5, atol=1e-6
    )
    assert len(grown) == 4  # still itself


def test_appending_copies_one_expert_and_keeps_the_memory_of_the_others():
    bank = make_bank([4] * 50)
    grown = bank.append(torch.zeros(2, bank.in_features), torch.zeros(bank.out_features, 2), 1.0)
    assert grown.slabs[0] is bank.slabs[0]
    replaced = grown
    for _ in range(10):  # what nobody uses any more is let go
        replaced = replaced.replace(
            50, torch.ones(1, bank.in_features), torch.ones(bank.out_features, 1), 1.0
        )
    assert len(replaced.slabs) == 2
    with pytest.raises(IndexError, match="no expert 51; this bank has 51"):
        replaced.remove(51)
    with pytest.raises(ValueError, match=r"the new expert has A \(2, 3\)"):
        bank.append(torch.zeros(2, 3), torch.zeros(bank.out_features, 2), 1.0)


@needs_compiler
def test_two_threads_at_a_time_get_what_one_gets():
    bank, x, chosen = make_bank([8] * 12), torch.randn(400, 45), make_chosen(400, 12, 2)
    with kernels.using("cpu"):
        expected = bank.apply_grouped(x, chosen)
    wrong = []

    def work() -> None:
        with kernels.using("cpu"):
            wrong.extend(
                1 for _ in range(20) if not torch.equal(bank.apply_grouped(x, chosen), expected)
            )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """As in a new process, with an empty cache."""
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(build, "library", functools.cache(build.library.__wrapped__))
    return tmp_path


def test_without_a_compiler_plain_torch_steps_in_and_says_why(unbuilt, monkeypatch):
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CC", raising=False)
    bank, chosen = make_bank([2] * 40), make_chosen(2, 40, 1)
    x = torch.randn(2, bank.in_features)
    torch.testing.assert_close(
        bank.apply(x, chosen).double(), slow_sum(bank, x, chosen), atol=2e-5, rtol=1e-5
    )
    assert kernels.missing() == "there is no C compiler (looked for $CC, cc, gcc and clang)"
    with kernels.using("cpu"), pytest.raises(RuntimeError, match="was asked for, but there is no"):
        bank.apply(x, chosen)


def test_a_compiler_that_fails_is_no_reason_to_stop(unbuilt, monkeypatch):
    broken = unbuilt / "cc"
    broken.write_text("#!/bin/sh\necho 'cpu.c: fatal error: no disk' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert kernels.missing() == "compiling it failed: cpu.c: fatal error: no disk"
    assert kernels.compiled(torch.zeros(1)) is None


@needs_compiler
def test_two_processes_build_once_and_leave_one_library(tmp_path):
    compiler = build._compiler()
    assert compiler is not None
    folder = tmp_path / "kernels"
    threads = [threading.Thread(target=build._built, args=(compiler, folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]
    (library,) = folder.glob("*.so")
    built = library.stat().st_mtime_ns
    assert build._built(compiler, folder) == library
    assert library.stat().st_mtime_ns == built


def test_kernels_are_chosen_by_name(monkeypatch):
    with (
        pytest.raises(ValueError, match="kernels is 'cuda'; it takes 'auto', 'torch', 'cpu'"),
        kernels.using("cuda"),
    ):
        pass
    monkeypatch.setenv("MTTL_KERNELS", "fast")
    with pytest.raises(ValueError, match="MTTL_KERNELS is 'fast'"):
        kernels.choice()
    monkeypatch.setenv("MTTL_KERNELS", "torch")
    assert kernels.compiled(torch.zeros(1)) is None


@pytest.mark.parametrize("ranks", [[4] * 6, [4, 0, 16, 1, 7, 0]])
@pytest.mark.parametrize(("lines", "tokens"), [(3, 1), (900, 1), (5, 40)])
def test_plain_torch_by_rows_equals_its_loop_over_experts(ranks, lines, tokens):
    bank = make_bank(ranks)
    apart = bank
    for expert in (0, 2, 4):  # the same experts, some in slabs of their own
        apart = apart.replace(expert, *list(bank.factors())[expert])
    looped = replace(bank)
    looped.__dict__["_in_rows"] = []
    assert [len(each._in_rows) for each in (bank, apart, looped)] == [1, 4, 0]
    x = torch.randn(lines * tokens, bank.in_features)
    chosen = make_chosen(lines, 6, 2)
    chosen = Chosen(chosen.experts, chosen.weights, tokens)
    output = torch.randn(len(x), bank.out_features)
    with kernels.using("torch"):
        sums = [each.add_to(output.clone(), x, chosen) for each in (bank, apart, looped)]
    for found in sums[:2]:
        torch.testing.assert_close(found, sums[2], atol=2e-5, rtol=1e-5)
