import dataclasses
import math

import pytest
import torch

from mttl_experts import (
    Expert,
    ExpertInfo,
    IncompatibleExpertError,
    LoraFactors,
    difference,
    distance,
    lora_modules,
    principal_angles,
)


def refactored(expert, seed=9):
    """The same ΔW under other factors: (B M) (M⁻¹ A)."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(expert.expert_weights)
    for name in [name for name in weights if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        mixing = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        weights[name] = (torch.linalg.inv(mixing) @ weights[name].double()).float()
        weights[other] = (weights[other].double() @ mixing).float()
    return Expert(dataclasses.replace(expert.expert_info, expert_name="again"), weights)


def dense(factors):
    return factors.scaling * factors.b.double() @ factors.a.double()


def test_distance_is_that_of_the_dense_updates(make_expert):
    one, other = lora_modules(make_expert("a")), lora_modules(make_expert("b", seed=1, rank=3))
    for path in one:
        wanted = torch.linalg.matrix_norm(dense(one[path]) - dense(other[path])).item()
        assert distance(one[path], other[path]) == pytest.approx(wanted, rel=1e-9)
        alone = torch.linalg.matrix_norm(dense(one[path])).item()
        assert distance(one[path], None) == pytest.approx(alone, rel=1e-9)
    assert distance(None, None) == 0.0


def test_two_near_experts_lose_no_digits_to_cancellation():
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    step = 1e-9 * torch.randn(6, 2, dtype=torch.float64)
    one, other = LoraFactors(a.double(), b.double(), 1.0), LoraFactors(a.double(), b + step, 1.0)
    wanted = torch.linalg.matrix_norm(step @ a.double()).item()
    assert distance(one, other) == pytest.approx(wanted, rel=1e-5)


def test_principal_angles_are_those_between_planes():
    def plane(angle):
        return torch.tensor([[1.0, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).T

    for angle in (0.0, 1e-7, 0.3, 1.2, math.pi / 2):
        found = principal_angles(plane(0.0).double(), plane(angle).double())
        assert found.tolist() == pytest.approx([0.0, angle], rel=1e-6, abs=1e-9)
    line = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).T
    assert principal_angles(line, plane(0.0)).tolist() == pytest.approx([math.pi / 2])


def test_another_factorisation_is_no_difference(make_expert):
    found = difference(make_expert("a"), refactored(make_expert("a")))
    assert not found.same_weights
    assert found.facts == {"expert_name": ("a", "again")}
    assert found.distance < 1e-4
    for module in found.modules.values():
        assert module.cosine == pytest.approx(1.0, abs=1e-6)
        assert max(module.input_angles + module.output_angles) < 0.1


def test_facts_and_modules_that_differ_are_named(make_expert):
    one = make_expert("a", task="t")
    other = make_expert("b", task="t", seed=1, shapes={"self_attn.q_proj": (16, 16)})
    found = difference(one, other)
    assert found.facts["expert_name"] == ("a", "b")
    assert found.facts["expert_config.target_modules"] == (["down_proj", "q_proj"], ["q_proj"])
    assert "expert_task_name" not in found.facts
    assert len(found.modules) == 4
    alone = found.modules["model.layers.0.mlp.down_proj"]
    assert alone.norms[1] == 0.0
    assert alone.distance == pytest.approx(alone.norms[0])
    assert alone.cosine is None
    both = found.modules["model.layers.0.self_attn.q_proj"]
    assert len(both.input_angles) == len(both.output_angles) == 2
    assert all(0 <= angle <= 90 for angle in both.input_angles)


def test_what_is_no_linear_update_is_compared_by_facts_alone(make_expert):
    found = difference(make_expert("a"), make_expert("b", use_dora=True))
    assert found.modules == {}
    assert "DoRA" in found.not_compared
    assert found.facts["expert_config.use_dora"] == (None, True)
    assert difference(make_expert("a"), Expert(ExpertInfo("b"))).not_compared
    with pytest.raises(IncompatibleExpertError, match="have different bases"):
        difference(make_expert("a"), make_expert("b", shapes={"self_attn.q_proj": (16, 8)}))
