"""Triton's kernels against a slow loop: on a GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mttl_adapters import kernels
from mttl_adapters.bank import Bank
from mttl_adapters.chosen import NONE, Chosen
from mttl_adapters.crossover import device_groups
from mttl_adapters.scores import Keys, top_k

IN, OUT = 40, 150
SLOW = pytest.mark.slow


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := kernels.no_triton(torch.device(request.param)):
        pytest.skip(f"no Triton: {reason}")
    with kernels.using("triton"):
        yield torch.device(request.param)


@pytest.fixture(params=["few", "many"])
def path(request, device, monkeypatch):
    """Each pair by itself, and pairs sorted by expert with the updates in blocks of columns."""
    from mttl_adapters.kernels import triton

    monkeypatch.setattr(triton, "FEW_BYTES", 1 << 40 if request.param == "few" else 0)
    monkeypatch.setattr(triton, "UPDATES_BYTES", 0)
    monkeypatch.setattr(triton, "NARROWEST", 128)
    return request.param


def make_factors(ranks, dtype=torch.float32, features=(IN, OUT), seed=0):
    generator = torch.Generator().manual_seed(seed)
    i, o = features
    return [
        (
            (torch.randn(rank, i, generator=generator) / 4).to(dtype),
            (torch.randn(o, rank, generator=generator) / 4).to(dtype),
            0.5 + 0.25 * index,
        )
        for index, rank in enumerate(ranks)
    ]


def make_chosen(tokens, experts, k, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    picked = torch.rand(tokens, experts, generator=generator).topk(k, dim=1).indices
    picked[torch.rand(tokens, k, generator=generator) < 0.2] = NONE
    return Chosen(picked.to(device), (torch.rand(tokens, k, generator=generator) - 0.25).to(device))


def slow_sum(factors, x: Tensor, chosen: Chosen) -> Tensor:
    """One pair of token and expert at a time, in float64; autograd goes through it."""
    chosen = chosen.each()
    lines = []
    for token, experts in enumerate(chosen.experts.tolist()):
        line = torch.zeros(factors[0][1].shape[0], dtype=torch.float64)
        for place, expert in enumerate(experts):
            if 0 <= expert < len(factors):
                a, b, scaling = factors[expert]
                weight = chosen.weights[token, place].double().cpu() * scaling
                update = b.double().cpu() @ (a.double().cpu() @ x[token].double().cpu())
                line = line + weight * update
        lines.append(line)
    return torch.stack(lines) if lines else torch.zeros(0, factors[0][1].shape[0]).double()


def close(found: Tensor, expected: Tensor, tolerance=1e-5) -> None:
    assert found.shape == expected.shape
    error = (found.double().cpu() - expected).norm()
    assert error <= tolerance * expected.norm(), f"{error / expected.norm():.1e} of the norm"


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_ranks_equal_the_slow_loop_and_outputs_are_rounded_once(
    device, path, dtype, bank_dtype
):
    factors = make_factors([4, 0, 16, 1, 70], bank_dtype)
    bank = Bank.from_factors(factors, device=device)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    chosen = make_chosen(6, 5, 2, device)
    right = slow_sum(factors, x, chosen)
    rounded = torch.bfloat16 == dtype == bank_dtype  # which the interpreter does towards 0
    close(bank.apply_grouped(x, chosen), right, 1e-2 if rounded else 1e-5)
    output = torch.randn(6, OUT, device=device).to(dtype)
    given = output.clone()
    assert bank.add_to(given, x, chosen) is given
    close(given, output.double().cpu() + right, 1e-5 if dtype == torch.float32 else 1e-2)


def test_rows_that_are_aligned_and_those_of_views(device, path):
    factors = make_factors([3, 8], features=(64, 128))
    bank, wide = Bank.from_factors(factors, device=device), torch.randn(5, 3 * 64, device=device)
    assert bank.aligned
    assert not Bank.from_factors(make_factors([3], features=(3, 8))).aligned
    chosen = make_chosen(5, 2, 1, device)
    x = wide[:, 64:128]
    close(bank.apply_grouped(x, chosen), slow_sum(factors, x, chosen))
    crossed = torch.randn(64, 5, device=device).T
    close(bank.apply_grouped(crossed, chosen), slow_sum(factors, crossed, chosen))


def test_nothing_to_add_adds_nothing(device, path):
    factors = make_factors([4, 2])
    bank = Bank.from_factors(factors, device=device)
    empty = torch.zeros(0, IN, device=device)
    assert bank.apply_grouped(empty, make_chosen(0, 2, 1, device)).shape == (0, OUT)
    x = torch.randn(3, IN, device=device)
    for experts in ([[]] * 3, [[NONE]] * 3, [[NONE, NONE]] * 3):
        picked = torch.tensor(experts, dtype=torch.int64, device=device)
        chosen = Chosen(picked, torch.ones(picked.shape, device=device))
        assert bank.apply_grouped(x, chosen).eq(0).all()
    none = Bank.from_factors(make_factors([0]), device=device)
    assert none.apply_grouped(x, make_chosen(3, 1, 1, device)).eq(0).all()


def test_one_expert_for_all_the_same_twice_and_one_beyond_the_bank(device, path):
    factors = make_factors([5])
    bank, x = Bank.from_factors(factors, device=device), torch.randn(9, IN, device=device)
    picked = torch.tensor([[0, 0]] * 8 + [[1, 0]], device=device)  # 1 counts as none
    chosen = Chosen(picked, torch.rand(9, 2, device=device))
    close(bank.apply_grouped(x, chosen), slow_sum(factors, x, chosen))


def test_lines_of_several_tokens(device, path):
    factors = make_factors([4, 8, 2])
    bank, x = Bank.from_factors(factors, device=device), torch.randn(6, IN, device=device)
    chosen = Chosen.for_rows(torch.tensor([[1, 0], [NONE, 2]], device=device), 3)
    close(bank.apply_grouped(x, chosen), slow_sum(factors, x, chosen))


def test_appended_replaced_and_removed_experts(device, path):
    factors = make_factors([3, 5, 2, 4])
    bank = Bank.from_factors(factors[:2], device=device).append(*factors[2])
    bank = bank.replace(0, *factors[3]).remove(1)
    x, chosen = torch.randn(4, IN, device=device), make_chosen(4, 2, 2, device)
    close(bank.apply_grouped(x, chosen), slow_sum([factors[3], factors[2]], x, chosen))


def test_gradients_equal_those_of_the_slow_loop(device, path):
    ranks, found, right = [3, 0, 18], [], []
    for grads, function in ((found, Bank.apply_grouped), (right, None)):
        factors = [
            (a.double().requires_grad_(), b.double().requires_grad_(), s)
            for a, b, s in make_factors(ranks)
        ]
        x = torch.linspace(-1, 1, 7 * IN, dtype=torch.float64).view(7, IN).requires_grad_()
        given = make_chosen(7, 3, 2)
        weights = given.weights.double().requires_grad_()
        chosen = Chosen(given.experts, weights)
        if function is None:
            out = slow_sum(factors, x, chosen)
        else:
            bank = Bank.from_factors(factors, device=device)
            moved = Chosen(given.experts.to(device), weights.to(device))
            out = function(bank, x.to(device), moved).cpu()
        (out * torch.arange(OUT)).sum().backward()
        grads += [x.grad, weights.grad, *(part.grad for a, b, _ in factors for part in (a, b))]
    torch.testing.assert_close(found, right)


def test_gradcheck_in_float64(device):
    chosen = make_chosen(3, 3, 2)
    parts = [torch.randn(r, 6).double().requires_grad_() for r in (3, 0, 1)]
    parts += [torch.randn(9, r).double().requires_grad_() for r in (3, 0, 1)]
    x = torch.randn(3, 6).double().requires_grad_()
    weights = chosen.weights.double().requires_grad_()

    def function(x: Tensor, weights: Tensor, *parts: Tensor) -> Tensor:
        pairs = zip(parts[:3], parts[3:], [0.5, 1.0, 2.0], strict=True)
        bank = Bank.from_factors(list(pairs), device=device)
        picked = Chosen(chosen.experts.to(device), weights.to(device))
        return bank.apply_grouped(x.to(device), picked).cpu()

    assert torch.autograd.gradcheck(function, (x, weights, *parts), fast_mode=True)


def test_bfloat16_gradients_are_those_of_float64_within_rounding(device, path):
    factors = make_factors([4, 9], torch.bfloat16)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(5)).bfloat16()
    chosen = make_chosen(6, 2, 2)
    grads = []
    for function in (lambda x, chosen: slow_sum(factors, x, chosen), None):
        own = (x.double() if function else x.to(device)).requires_grad_()
        weights = chosen.weights.double() if function else chosen.weights.to(device)
        picked = Chosen(chosen.experts.to(own.device), weights.requires_grad_())
        bank = Bank.from_factors(factors, device=own.device)
        out = function(own, picked) if function else bank.apply_grouped(own, picked)
        out.sum().backward()
        grads.append((own.grad, weights.grad))
        own, x = None, x.detach()
    for found, right in zip(grads[1], grads[0], strict=True):
        close(found, right, 1e-2)


class NothingIsWaitedFor(TorchDispatchMode):
    """Refuses what brings a number from the device to the host, or a size that depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "bincount"}, name
        assert "unique" not in name, name
        return function(*args, **(kwargs or {}))


def test_the_device_is_not_waited_for(device, path):
    factors = make_factors([4, 0, 9])
    bank = Bank.from_factors(factors, device=device).learnable()
    x, output = torch.randn(5, IN, device=device), torch.randn(5, OUT, device=device)
    keys = Keys(torch.randn(30, IN, device=device))

    def work() -> None:
        with torch.no_grad():
            (best,) = top_k(x, keys, 2)
            bank.add_to(output.clone(), x, Chosen(best.indices % 3, best.values))
        given = x.clone().requires_grad_()
        chosen = Chosen(best.indices % 3, torch.ones(5, 2, device=device))
        bank.apply_grouped(given, chosen).sum().backward()

    work()  # what is made once
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NothingIsWaitedFor():
            work()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# Scores.


@pytest.fixture(params=["highest", "medium"])
def precision(request):
    """What torch may round float32 products to, which the scores must not depend on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_are_those_of_float64_whatever_torch_may_round(device, precision, kernel, dtype):
    """Keys so near to each other that TF32, with 11 bits, takes others."""
    if device.type == "cpu" and kernel == "torch":
        pytest.skip("plain torch on a CPU is tested in test_scores.py")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 576, generator=generator).to(dtype)
    direction = torch.nn.functional.normalize(torch.randn(576, generator=generator), dim=0)
    sets = [
        direction + torch.randn(e, 576, generator=generator) * 2**-11 / 24 for e in (60, 7, 130)
    ]
    sets[1][:] = 0.0  # all equal
    with kernels.using(kernel):
        found = top_k(x.to(device), Keys(sets).to(device), 3, absolute=True)
    for keys, (values, indices) in zip(sets, found, strict=True):
        right = (x.double() @ keys.double().T).abs().topk(4, dim=1)
        torch.testing.assert_close(values.double().cpu(), right.values[:, :3], atol=1e-5, rtol=0)
        clear = right.values[:, 2] - right.values[:, 3] > 1e-6 * x.double().norm(dim=1)
        ours, theirs = indices.cpu().sort(1).values, right.indices[:, :3].sort(1).values
        assert torch.equal(ours[clear], theirs[clear])
    if kernel == "triton":
        assert found[1].indices.tolist() == [[0, 1, 2]] * 6


@pytest.mark.parametrize("absolute", [False, True])
def test_selecting_in_blocks_of_tokens_and_of_more_keys_than_one_program_takes(
    device, absolute, monkeypatch
):
    from mttl_adapters.kernels import triton

    monkeypatch.setattr("mttl_adapters.scores.SCREENED_KEYS", 1)
    x, sets = torch.randn(7, 24), [torch.randn(5, 24), torch.randn(9, 24)]
    monkeypatch.setattr(triton, "MOST_KEYS", 8)
    monkeypatch.setattr(triton, "PRODUCTS_BYTES", 3 * 14 * 4 * 3)  # three tokens
    found = top_k(x.to(device), Keys(sets).to(device), 8, absolute=absolute)
    for keys, (values, indices) in zip(sets, found, strict=True):
        scores = x.double() @ keys.double().T
        right = (scores.abs() if absolute else scores).topk(min(8, len(keys)), dim=1)
        assert torch.equal(indices.cpu(), right.indices)
        torch.testing.assert_close(values.double().cpu(), right.values, atol=1e-5, rtol=0)


def test_keys_that_learn_get_gradients(device):
    x, keys = torch.randn(4, 10, device=device), torch.randn(6, 10, device=device)
    x.requires_grad_()
    keys.requires_grad_()
    (found,) = top_k(x, Keys(keys), 2)
    found.values.sum().backward()
    lines = torch.zeros(4, 6).scatter(1, found.indices.cpu(), 1.0)
    torch.testing.assert_close(x.grad.cpu(), lines @ keys.detach().cpu())
    torch.testing.assert_close(keys.grad.cpu(), lines.T @ x.detach().cpu())


# What is there, and what is chosen.


def test_the_crossover_of_a_gpu():
    assert device_groups(2048, 4 * 2048, 256 * 16, 256)
    assert device_groups(32, 4 * 32, 256 * 16, 256)
    assert not device_groups(2048, 2 * 2048, 8 * 16, 8)
    assert not device_groups(32, 2 * 32, 8 * 16, 8)


def test_triton_that_cannot_run_is_an_error_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(kernels, "no_triton", lambda device: "it is not installed")
    bank, x = Bank.from_factors(make_factors([2])), torch.randn(2, IN)
    chosen = make_chosen(2, 1, 1)
    with kernels.using("triton"), pytest.raises(RuntimeError, match="for, but it is not installed"):
        bank.apply_grouped(x, chosen)
    bank.apply_grouped(x, chosen)


COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mttl_adapters.kernels import programs

numbers = {name: "i32" for name in (
    "x_row out_row features experts k widest begin width pairs share keys x_step key_step row"
).split()}
tensors = {"order": "*i32", "offsets": "*i32", "table": "*i64", "starts": "*i64",
           "chosen": "*i64", "parts": "*fp32", "values": "*fp32", "indices": "*i64"}
blocks = {"E": 256, "M": 32, "N": 32, "R": 16, "SIDE": 1, "ALIGNED": True, "PARTS": 4,
          "ABSOLUTE": True, "OF_X": 1, "OF_KEYS": 3}
dtype = sys.argv[1]
of_x = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}[dtype]
of_sums, sums = (of_x, "*fp64") if dtype == "fp64" else (tl.float32, "*fp32")
types = {**numbers, **tensors, "hidden": sums, "weights": sums}
types |= dict.fromkeys(("x", "out", "updates"), "*" + dtype)
constants = {**blocks, "F": of_x, "C": of_x, "S": of_sums}
for program in (programs.down, programs.up, programs.gather, programs.outer, programs.down_few,
                programs.up_few, programs.order_pairs, programs.select):
    names = program.arg_names
    own = types | ({"experts": "*i64"} if program is programs.order_pairs else {})
    signature = {name: "constexpr" if name in constants else own[name] for name in names}
    given = {(names.index(name),): constants[name] for name in names if name in constants}
    made = triton.compile(ASTSource(program, signature, given), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
    print(program.__name__)
"""


@pytest.mark.skipif(
    kernels.no_triton(torch.device("cpu")) == "it is not installed", reason="Triton is not there"
)
@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(n, marks=SLOW) for n in ("fp32", "fp64"))]
)
def test_every_program_compiles_for_a_gpu_that_need_not_be_here(tmp_path, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(tmp_path, "compile_programs.py")
    script.write_text(COMPILE)
    run = subprocess.run(
        [sys.executable, str(script), dtype], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 8
