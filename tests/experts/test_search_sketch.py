import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts import LoraFactors, inner_product, lora_modules
from mttl_experts.search import sketch as public
from mttl_experts.search.sketch import WIDTH, _choices, sketch

SHAPES = {"layers.0.q": (12, 10), "layers.1.q": (12, 10), "layers.0.down": (7, 20)}


def modules(seed=0, rank=3, shapes=SHAPES, scaling=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraFactors(
            torch.randn(rank, i, generator=generator),
            torch.randn(o, rank, generator=generator),
            scaling,
        )
        for path, (o, i) in shapes.items()
    }


def slow_sketch(modules, width):
    """Entry by entry of the ΔW that is never formed otherwise."""
    row = torch.zeros(width, dtype=torch.float64)
    for path, f in modules.items():
        delta = f.scaling * f.b.double() @ f.a.double()
        h, s = _choices(f"{path} out", delta.shape[0], width)
        g, t = _choices(f"{path} in", delta.shape[1], width)
        for p in range(delta.shape[0]):
            for q in range(delta.shape[1]):
                row[(h[p] + g[q]) % width] += s[p] * t[q] * delta[p, q]
    return row


def close(one, other, tolerance=1e-5):
    return float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


@pytest.mark.parametrize("width", [8, 64, 1024])
def test_a_sketch_is_a_signed_sum_of_the_entries_of_delta(width):
    assert close(sketch(modules(), width), slow_sketch(modules(), width))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 999), st.floats(0.05, 20))
def test_no_refactorisation_changes_a_sketch(rank, seed, scale):
    one = modules(seed, rank)
    generator = torch.Generator().manual_seed(seed)
    other = {}
    for path, f in one.items():
        mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q * 1.7
        a, b = torch.linalg.inv(mix) @ f.a, f.b @ mix
        a = torch.cat(
            [a, torch.randn(2, a.shape[1], generator=generator)]
        )  # rank padded, B being 0
        b = torch.cat([b, torch.zeros(b.shape[0], 2)], 1)
        other[path] = LoraFactors(a * scale, b, f.scaling / scale)
    assert close(sketch(other), sketch(one))


def test_a_sketch_is_linear_and_a_missing_module_is_zero():
    both = modules()
    parts = [{path: factors} for path, factors in both.items()]
    assert close(sum(sketch(part) for part in parts), sketch(both))
    doubled = {p: LoraFactors(f.a, f.b, 2 * f.scaling) for p, f in both.items()}
    assert close(sketch(doubled), 2 * sketch(both))
    assert sketch({}).tolist() == [0.0] * WIDTH


def test_products_of_sketches_have_the_exact_product_as_their_mean():
    one = modules(1)
    other = {
        path: LoraFactors(torch.cat([f.a, g.a]), torch.cat([f.b, 0.7 * g.b], 1), 0.5)
        for (path, f), g in zip(one.items(), modules(2).values(), strict=True)
    }
    width, found = 256, []
    for trial in range(400):  # other signs by other paths
        a, b = ({f"{trial} {p}": f for p, f in m.items()} for m in (one, other))
        found.append(float(sketch(a, width) @ sketch(b, width)))
    products = torch.tensor(found)
    exact = inner_product(one, other)
    error = products.std() / len(found) ** 0.5
    assert abs(products.mean() - exact) < 4 * error
    size = (inner_product(one, one) * inner_product(other, other)) ** 0.5
    assert products.std() < 2 * size / width**0.5


def test_modules_of_one_shape_do_not_stand_for_each_other():
    q = LoraFactors(torch.randn(2, 10), torch.randn(12, 2), 1.0)
    one, other = sketch({"layers.0.q": q}), sketch({"layers.1.q": q})
    assert abs(torch.cosine_similarity(one, other, 0)) < 0.2


def test_half_precision_factors_are_sketched_as_their_values():
    half = {p: LoraFactors(f.a.bfloat16(), f.b.bfloat16(), f.scaling) for p, f in modules().items()}
    full = {p: LoraFactors(f.a.float(), f.b.float(), f.scaling) for p, f in half.items()}
    assert torch.equal(sketch(half), sketch(full))


def test_the_choices_never_change(make_expert):
    """Sketches are kept for years, so a change of these needs a new version in the recipe."""
    places, signs = _choices("model.layers.0.mlp.up_proj in", 1000, WIDTH)
    text = f"{places.tolist()} {signs.int().tolist()}"
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "bd036a16b6448921"
    assert public(lora_modules(make_expert())).shape == (WIDTH,)
