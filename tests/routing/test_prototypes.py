import pytest
import torch

from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing.routers import arrow_prototypes
from mttl_routing.routers.arrow import prototypes_of
from mttl_routing.routers.prototypes import top_directions


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator).double()).Q


def from_spectrum(sigma, generator, out_features=40, in_features=56):
    """A and B, mixed by a random matrix, so that B A has these singular values; and its v_1."""
    rank = len(sigma)
    u, v = (orthonormal(n, rank, generator) for n in (out_features, in_features))
    mix = torch.randn(rank, rank, generator=generator).double() + 2 * torch.eye(rank)
    b = u @ torch.diag(torch.tensor(sigma).double()) @ mix
    return torch.linalg.solve(mix, v.T), b, v[:, 0]


def amplified(a, b, direction):
    """‖ΔW v‖/‖ΔW‖ in float64, of a v at unit length."""
    delta = b.double() @ a.double()
    v = direction.double()
    return float((delta @ v).norm() / v.norm() / torch.linalg.matrix_norm(delta, ord=2))


SPECTRA = {
    "flat": [1.0] * 16,
    "two alike": [1.0, 1.0, 0.5, 0.1],
    "close": [1.0, 1 / 1.0001, 0.9, 0.9],
    "decaying": [0.5**n for n in range(16)],
    "steep": [10.0**-n for n in range(8)],
    "rank one": [1.0, 0.0, 0.0, 0.0],
    "deficient": [1.0, 0.7, 0.0, 0.0, 0.0],
    "large": [1e6, 3e5],
    "tiny": [1e-9, 3e-10],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_direction_is_amplified_more_than_the_prototype(spectrum, dtype):
    generator = torch.Generator().manual_seed(1)
    cases = [from_spectrum(SPECTRA[spectrum], generator) for _ in range(5)]
    a, b = ([case[n].to(dtype) for case in cases] for n in (0, 1))
    for direction, one, other in zip(top_directions(a, b), a, b, strict=True):
        assert amplified(one, other, direction) >= 1 - 1e-6
        assert abs(float(direction.norm()) - 1) < 1e-6


def test_the_prototype_is_the_singular_vector_where_the_spectrum_has_a_gap():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        a, b, v = from_spectrum(SPECTRA["close"], generator)
        (direction,) = top_directions([a], [b])
        assert 1 - abs(float(direction.double() @ v)) <= 1e-6


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_a_direction_of_a_that_b_annihilates_does_no_harm(size):
    generator = torch.Generator().manual_seed(3)
    v, u = orthonormal(56, 3, generator).T, orthonormal(40, 2, generator)
    turn = orthonormal(3, 3, generator)
    a = turn.T @ (torch.tensor([[size], [1.0], [0.5]]) * v)
    b = torch.cat([torch.zeros(40, 1), u], dim=1) @ turn
    (direction,) = top_directions([a], [b])
    assert 1 - abs(float(direction.double() @ v[1])) <= 1e-6


def test_factors_that_are_thin_or_zero_have_directions_too():
    a, b = torch.randn(5, 3), torch.randn(2, 5)  # more ranks than features
    assert amplified(a, b, top_directions([a], [b])[0]) >= 1 - 1e-6
    zero_a, zero_b, nan = top_directions(
        [torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), torch.nan)],
        [torch.ones(4, 2), torch.zeros(4, 2), torch.ones(4, 2)],
    )
    assert (zero_a == 0).all()
    assert (zero_b == 0).all()
    assert nan.isnan().all()


def test_prototypes_are_those_of_each_module(make_expert):
    expert = make_expert(
        "anna", rank_pattern={"layers.1.self_attn.q_proj": 7}, targets=("q_proj", "down_proj")
    )
    prototypes = arrow_prototypes(expert)
    factors = lora_modules(expert)
    assert list(prototypes) == list(factors)
    for module, f in factors.items():
        assert amplified(f.a, f.b, prototypes[module]) >= 1 - 1e-6


def test_a_weight_that_is_not_finite_is_named(make_expert):
    expert = make_expert("anna")
    f = lora_modules(expert)["model.layers.1.self_attn.q_proj"]
    f.a[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'anna': module 'model\.layers\.1\.self_attn\.q_proj'"):
        arrow_prototypes(expert)


def test_a_library_keeps_prototypes_by_one_commit_and_a_replaced_expert_has_its_own(make_expert):
    library = ExpertLibrary("virtual://prototypes", create=True)
    library.add_expert(make_expert("anna"))
    library.add_expert(make_expert("bert"))
    before = library.generation
    made = prototypes_of(list(library.values()), library)
    assert library.generation == before + 1
    again = prototypes_of(list(library.values()), library)
    assert library.generation == before + 1
    module = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(again["anna"][module], made["anna"][module], rtol=0, atol=0)
    library.replace_expert(make_expert("anna", seed=9))
    new = prototypes_of(list(library.values()), library)
    assert abs(float(new["anna"][module] @ made["anna"][module])) < 0.99
    assert torch.equal(new["bert"][module], made["bert"][module])
