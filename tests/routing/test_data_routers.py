"""What centroids, gates and calibrations learn, and how it is kept."""

import pytest
import torch

from mttl_experts import Expert, ExpertLibrary, lora_modules
from mttl_routing import RoutedModel, apply_expert, calibration, centroids, train_gates
from mttl_routing.routers import kinds, norm_factors

PATH = "model.layers.1.self_attn.v_proj"


def make_batches(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (4, 3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, :4] = 0
    return [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


@pytest.fixture
def inputs(base, make_expert):
    """Inputs of one module with the expert attached, padding left out, by a plain hook."""
    seen = []
    with apply_expert(base, make_expert("anna")) as routed:
        hook = base.get_submodule(PATH).register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        with torch.no_grad():
            for batch in make_batches():
                routed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in make_batches()]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])


def test_a_centroid_is_the_mean_input_of_all_tokens_that_count(base, make_expert, inputs):
    found = centroids(base, make_expert("anna"), iter(make_batches()))
    assert found.keys() == lora_modules(make_expert("anna")).keys()
    torch.testing.assert_close(found[PATH], inputs.mean(0), rtol=1e-4, atol=1e-5)


def test_a_calibration_is_the_mean_and_deviation_of_the_norms(base, make_expert, inputs):
    expert = make_expert("anna")
    f = lora_modules(expert)[PATH]
    norms = (f.scaling * f.b @ f.a @ inputs.T).norm(dim=0)
    expected = torch.stack([norms.mean(), norms.std(correction=0)])
    found = calibration(base, expert, make_batches())[PATH]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 20])  # 20 are more than k_proj has outputs
def test_a_norm_factor_has_the_norms_of_what_the_expert_adds(make_expert, rank):
    expert = make_expert("anna", rank=rank, rslora=True, targets=("k_proj", "down_proj"))
    for path, factor in norm_factors(expert).items():
        f = lora_modules(expert)[path]
        hidden = torch.randn(rank, 5)
        torch.testing.assert_close(
            (factor @ hidden).norm(dim=0), (f.scaling * f.b @ hidden).norm(dim=0)
        )


def test_gates_learn_and_move_nothing_else(base, make_expert):
    expert = make_expert("anna")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    factors = {name: tensor.clone() for name, tensor in (expert.expert_weights or {}).items()}
    batches = make_batches()
    gates = train_gates(base, expert, batches, steps=30, learning_rate=0.05)

    def loss_of(vectors) -> float:
        class Gated:
            def gates(self, x, layer, rows):
                return torch.sigmoid(x @ vectors[layer.module]).unsqueeze(1)

        with (
            RoutedModel.from_experts([expert], Gated(), base_model=base) as routed,
            torch.no_grad(),
        ):
            return sum(float(routed(**batch).loss) for batch in batches)

    closed = {module: torch.zeros_like(gate) for module, gate in gates.items()}
    assert loss_of(gates) < loss_of(closed) - 0.1
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in (expert.expert_weights or {}).items():
        assert torch.equal(tensor, factors[name])


@pytest.mark.parametrize("adapts_the_head", [False, True])
def test_gates_are_those_that_the_model_s_own_loss_trains(base, make_expert, adapts_the_head):
    """The head is computed for labelled tokens alone, unless the expert changes the head."""
    expert = make_expert("anna")
    if adapts_the_head:
        head = {"lora_A": torch.randn(4, 32) * 0.3, "lora_B": torch.randn(61, 4) * 0.3}
        weights = {f"base_model.model.lm_head.{part}.weight": t for part, t in head.items()}
        info = make_expert("anna", target_modules=["q_proj", "v_proj", "lm_head"],
                           layers_to_transform=None).expert_info  # fmt: skip
        expert = Expert(info, weights | expert.expert_weights)
    batches = make_batches()
    for batch in batches:
        batch["labels"][:, :3] = -100
    paths = list(lora_modules(expert))
    assert ("lm_head" in paths) == adapts_the_head

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            widths = [factors.a.shape[1] for factors in lora_modules(expert).values()]
            self.vectors = torch.nn.ParameterList([torch.zeros(width) for width in widths])

        def gates(self, x, layer, rows):
            return torch.sigmoid(x @ self.vectors[paths.index(layer.module)]).unsqueeze(1)

    gated = Gated()
    optimizer = torch.optim.AdamW(gated.parameters(), lr=0.05, weight_decay=0.0)
    with RoutedModel.from_experts([expert], gated, base_model=base) as routed:
        for step in range(8):
            optimizer.zero_grad()
            routed(**batches[step % 4]).loss.backward()
            optimizer.step()
    found = train_gates(base, expert, batches, steps=8, learning_rate=0.05)
    for path, expected in zip(paths, gated.vectors, strict=True):
        torch.testing.assert_close(found[path], expected.detach(), rtol=1e-3, atol=1e-3)


def test_what_was_learned_is_kept_by_expert_and_data_and_never_stale(base, make_expert):
    library = ExpertLibrary("virtual://learned", create=True)
    for name in ("anna", "bert"):
        library.add_expert(make_expert(name))
    data = {"anna": make_batches(1), "bert": make_batches(2)}

    def vectors():
        with RoutedModel.from_library(library, "centroid", base_model=base, batches=data) as routed:
            return dict(zip(data, routed.router._stacked.rows(PATH, list(data)).keys, strict=True))

    before = library.generation
    first = vectors()
    assert library.generation == before + 1  # one commit for both
    assert torch.equal(vectors()["anna"], first["anna"])
    assert library.generation == before + 1
    data["anna"] = make_batches(3)
    assert not torch.equal(vectors()["anna"], first["anna"])
    library.replace_expert(make_expert("bert", seed=5))
    assert not torch.equal(vectors()["bert"], first["bert"])


def test_gates_outlast_an_interruption(base, make_expert, monkeypatch):
    library = ExpertLibrary("virtual://gates", create=True)
    for name in ("anna", "bert"):
        library.add_expert(make_expert(name))
    trained, seen = [], []

    def interrupted(base, expert, batches, **options):
        trained.append(expert.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_gates(base, expert, batches, **options)

    monkeypatch.setattr(kinds, "train_gates", interrupted)

    def make():
        return RoutedModel.from_library(
            library,
            "phatgoose",
            base_model=base,
            batches=lambda expert: make_batches(),
            gate_steps=2,
            progress=lambda *told: seen.append(told),
        )

    with pytest.raises(KeyboardInterrupt):
        make()
    make().remove()
    assert trained == ["anna", "bert", "bert"]
    assert seen == [(f"gates of {name}", n, 2) for name in ("anna", "bert") for n in range(3)]


def test_one_expert_is_asked_for_its_data_at_a_time(base, make_expert):
    asked = []

    def batches(expert):
        asked.append(expert.name)
        return iter(make_batches())

    experts = [make_expert("anna"), make_expert("bert")]
    with RoutedModel.from_experts(experts, "centroid", base_model=base, batches=batches) as routed:
        assert set(asked) == {"anna", "bert"}
        with pytest.raises(ValueError, match="needs data of expert 'cleo'"):
            routed.add_expert(make_expert("cleo"))


@pytest.mark.parametrize("router", ["centroid", "phatgoose"])
def test_a_router_without_its_data_says_what_it_wants(base, make_expert, router):
    with pytest.raises(ValueError, match=f"'{router}' learns from data of each expert; give batch"):
        RoutedModel.from_experts([make_expert("anna")], router, base_model=base)
    with pytest.raises(ValueError, match="no batches were given for expert 'anna'"):
        RoutedModel.from_experts(
            [make_expert("anna")], router, base_model=base, batches={"anna": []}
        )


def test_an_expert_added_later_has_what_arrow_and_norms_need(base, make_expert, tokens):
    one, other = make_expert("anna"), make_expert("bert")
    for router in ("arrow", "spectr"):
        with RoutedModel.from_experts([one, other], router, base_model=base) as routed:
            expected = routed(tokens).logits
        with RoutedModel.from_experts([one], router, base_model=base) as routed:
            routed.add_expert(other)
            torch.testing.assert_close(routed(tokens).logits, expected)
