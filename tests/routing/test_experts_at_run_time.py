"""Experts that come, go, change and are switched off while a routed model is in use."""

import threading

import pytest
import torch
from torch import Tensor

from mttl_experts import Expert, IncompatibleExpertError
from mttl_routing import RoutedModel, Uniform

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


class Told:
    """A uniform router that keeps what it is told of the experts."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[str], list[str]]] = []

    def gates(self, x, layer, rows):
        return Uniform().gates(x, layer, rows)

    def follow(self, added, removed):
        self.heard.append(([expert.name for expert in added], list(removed)))


def expected_of(base, experts: list[Expert], tokens: Tensor, router="uniform") -> Tensor:
    with RoutedModel.from_experts(experts, router, base_model=base) as routed:
        return logits_of(routed, tokens)


def test_adding_replacing_and_removing_equals_building_anew(
    base, mixed_experts, make_expert, tokens
):
    anna, bert, cleo, dora = mixed_experts
    wide = make_expert("evan", rank=9, targets=("k_proj", "v_proj"))  # k_proj is new
    other = make_expert("anna", seed=99, targets=("gate_proj",), layers=(1,))
    expected = [
        expected_of(base, experts, tokens)
        for experts in ([anna, bert, cleo, dora, wide], [other, bert, cleo, dora, wide],
                        [bert, cleo, dora, wide])
    ]  # fmt: skip
    router = Told()
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        first = logits_of(routed, tokens)
        routed.add_expert(wide)
        assert routed.experts == ("anna", "bert", "cleo", "dora-the-name", "evan")
        torch.testing.assert_close(logits_of(routed, tokens), expected[0], **CLOSE)
        routed.replace_expert(other)
        torch.testing.assert_close(logits_of(routed, tokens), expected[1], **CLOSE)
        routed.remove_expert("anna")
        torch.testing.assert_close(logits_of(routed, tokens), expected[2], **CLOSE)
        routed.add_expert(anna)
        routed.remove_expert("evan")
        torch.testing.assert_close(logits_of(routed, tokens), first, **CLOSE)
    assert router.heard == [
        (["evan"], []), (["anna"], ["anna"]), ([], ["anna"]), (["anna"], []), ([], ["evan"]),
    ]  # fmt: skip
    assert not any(module._forward_hooks for module in base.modules())


def test_the_others_are_not_copied_when_one_comes(base, mixed_experts, make_expert):
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        before = {path: bank.slabs[0] for path, bank in routed._hooks.roster.banks.items()}
        routed.add_expert(make_expert("evan"))
        routed.disable("anna")
        routed.remove_expert("bert")
        for path, bank in routed._hooks.roster.banks.items():
            assert bank.slabs[0] is before[path]


def test_switched_off_experts_are_as_if_they_were_not_there(base, mixed_experts, tokens):
    kept = [mixed_experts[index] for index in (0, 2)]
    for router in ("uniform", "arrow"):
        expected = expected_of(base, kept, tokens, router)
        with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
            logits_of(routed, tokens)  # from the second on, layers that share an input go together
            whole = logits_of(routed, tokens)
            routed.disable("bert", "dora-the-name")
            assert routed.enabled == ("anna", "cleo")
            torch.testing.assert_close(logits_of(routed, tokens), expected, **CLOSE)
            routed.enable("bert")
            assert routed.enabled == ("anna", "bert", "cleo")
            routed.enable()
            assert torch.equal(logits_of(routed, tokens), whole)
            with routed.only("anna", "cleo"):
                torch.testing.assert_close(logits_of(routed, tokens), expected, **CLOSE)
            assert torch.equal(logits_of(routed, tokens), whole)
            with routed.only():
                found = logits_of(routed, tokens)
        torch.testing.assert_close(found, logits_of(base, tokens))


def test_gates_that_a_router_gives_to_a_switched_off_expert_count_as_none(
    base, mixed_experts, tokens
):
    class First:
        def gates(self, x, layer, rows):
            return torch.eye(len(layer.experts))[:1].expand(len(x), -1)

    class FirstByPrompt:
        def decide(self, prompt):
            return torch.eye(len(prompt.experts))[:1].expand(len(prompt.input_ids), -1)

    expected = logits_of(base, tokens)
    for router in (First(), FirstByPrompt()):
        with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
            assert not torch.equal(logits_of(routed, tokens), expected)
            with routed.without("anna"):
                torch.testing.assert_close(logits_of(routed, tokens), expected)


def test_blocks_are_nested_and_end(base, mixed_experts, tokens):
    alone = logits_of(base, tokens)
    expected = expected_of(base, [mixed_experts[2]], tokens)
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        whole = logits_of(routed, tokens)
        with routed.without("anna", "bert"):
            outer = logits_of(routed, tokens)
            with routed.without("dora-the-name"):
                torch.testing.assert_close(logits_of(routed, tokens), expected, **CLOSE)
                with routed.bare(), routed.bare():
                    assert torch.equal(logits_of(routed, tokens), alone)
                    assert torch.equal(logits_of(base, tokens), alone)
            assert torch.equal(logits_of(routed, tokens), outer)
            with pytest.raises(KeyError), routed.bare():
                raise KeyError
            assert torch.equal(logits_of(routed, tokens), outer)
        assert torch.equal(logits_of(routed, tokens), whole)


def test_a_block_is_of_its_thread(base, mixed_experts, tokens):
    found: dict[str, Tensor] = {}
    started = threading.Barrier(2)
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        whole = logits_of(routed, tokens)

        def run() -> None:
            with routed.bare():
                started.wait()
                found["bare"] = logits_of(routed, tokens)
                started.wait()

        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        assert torch.equal(logits_of(routed, tokens), whole)
        started.wait()
        thread.join()
    assert torch.equal(found["bare"], logits_of(base, tokens))


def test_a_row_keeps_its_decision_when_experts_come_and_go(
    base, mixed_experts, make_expert, tokens
):
    class Last:
        """Three quarters to cleo, the rest to anna."""

        def decide(self, prompt):
            gates = torch.zeros(len(prompt.input_ids), len(prompt.experts))
            gates[:, prompt.experts.index("cleo")] = 0.75
            gates[:, prompt.experts.index("anna")] = 0.25
            return gates

    with RoutedModel.from_experts(mixed_experts, Last(), base_model=base) as routed:
        logits = []
        for change in (False, True):
            cache = routed(tokens[:, :6], use_cache=True).past_key_values
            if change:
                routed.add_expert(make_expert("evan"))
                routed.remove_expert("bert")
            logits.append(logits_of(routed, tokens[:, 6:], past_key_values=cache))
    torch.testing.assert_close(*logits, **CLOSE)


def test_what_does_not_fit_is_refused_and_changes_nothing(base, mixed_experts, make_expert, tokens):
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        whole = logits_of(routed, tokens)
        with pytest.raises(ValueError, match="'anna' already; use replace_expert"):
            routed.add_expert(make_expert("anna"))
        with pytest.raises(IncompatibleExpertError, match="other/base"):
            routed.add_expert(make_expert("evan", model="other/base"))
        for unknown in (routed.disable, routed.enable, routed.remove_expert):
            with pytest.raises(ValueError, match="no expert 'ana'; did you mean 'anna'"):
                unknown("ana")
        with pytest.raises(ValueError, match="no expert 'evan'"):
            routed.replace_expert(make_expert("evan"))
        assert torch.equal(logits_of(routed, tokens), whole)
        assert routed.experts == routed.enabled
    with (
        RoutedModel.from_experts([make_expert("one")], "uniform", base_model=base) as routed,
        pytest.raises(ValueError, match="'one' is the only expert"),
    ):
        routed.remove_expert("one")
    with RoutedModel.from_experts(
        [make_expert("one")], "uniform", combine="before", base_model=base
    ) as routed:
        with pytest.raises(ValueError, match="one rank"):
            routed.add_expert(make_expert("two", rank=3))
        assert routed.experts == ("one",)


EXAMPLES = {
    "anna": ["add the two numbers", "sum of two numbers"],
    "bert": ["sort the letters", "sort the words of the list"],
    "cleo": ["name the capital", "name the country of the capital"],
}
PROMPTS = ["add two numbers", "sort the letters", "name one capital"]


@pytest.fixture
def fitted(mixed_experts, loaded):
    """Routes the experts of EXAMPLES by their prompts."""

    def make(router, experts=mixed_experts[:3], examples=EXAMPLES):
        options = {"then": "arrow"} if router == "retrieval, then arrow" else {}
        return RoutedModel.from_experts(
            experts, router.partition(",")[0], 1, base_model=loaded, examples=examples, **options
        )

    return make


@pytest.fixture
def prompts(tokenizer):
    """Three rows of one length."""
    return torch.tensor([tokenizer(text)["input_ids"] for text in PROMPTS])


@pytest.mark.parametrize("router", ["predictor", "lorauter", "retrieval", "retrieval, then arrow"])
def test_a_router_of_prompts_forgets_an_expert_that_went_and_refuses_one_unknown(
    fitted, mixed_experts, make_expert, prompts, router
):
    rest = {name: EXAMPLES[name] for name in ("anna", "cleo")}
    with fitted(router, mixed_experts[0:3:2], rest) as routed:
        expected = logits_of(routed, prompts)
    with fitted(router) as routed:
        whole = logits_of(routed, prompts)
        with pytest.raises(ValueError, match=r"'evan'.*make the routed model anew, with"):
            routed.add_expert(make_expert("evan"))
        assert torch.equal(logits_of(routed, prompts), whole)
        routed.remove_expert("bert")
        if router != "predictor":  # its weights of words depend on all examples
            torch.testing.assert_close(logits_of(routed, prompts), expected, **CLOSE)
        with pytest.raises(ValueError, match=r"'evan'"):
            routed.add_expert(make_expert("evan"))
        assert "bert" not in routed.experts
        if router != "lorauter":  # there it is the task that has examples, not the expert
            with pytest.raises(ValueError, match="needs examples of expert 'bert'"):
                routed.add_expert(mixed_experts[1])
            with pytest.raises(ValueError, match="needs examples of expert 'anna'"):
                routed.replace_expert(make_expert("anna", seed=9))


def test_lorauter_takes_up_an_expert_of_a_task_that_it_knows(
    fitted, mixed_experts, make_expert, prompts
):
    anna, bert, cleo, _ = mixed_experts
    evan, other = make_expert("evan", task=("bert", "unknown")), make_expert("cleo", task="anna")
    with fitted("lorauter", [anna, bert, other, evan], dict(list(EXAMPLES.items())[:2])) as routed:
        expected = logits_of(routed, prompts)
    with fitted("lorauter") as routed:
        before = logits_of(routed, prompts)
        routed.add_expert(evan)
        added = logits_of(routed, prompts)
        assert not torch.allclose(added, before, atol=1e-3)
        routed.replace_expert(other)  # now nobody serves cleo
        torch.testing.assert_close(logits_of(routed, prompts), expected, **CLOSE)
        routed.replace_expert(cleo)
        torch.testing.assert_close(logits_of(routed, prompts), added, **CLOSE)
        routed.remove_expert("evan")
        torch.testing.assert_close(logits_of(routed, prompts), before, **CLOSE)


def test_what_follows_retrieval_is_a_router_for_tokens(mixed_experts, loaded):
    for name, says in {"arow": "no router 'arow'", "logo": "'logo' decides for whole rows"}.items():
        with pytest.raises(ValueError, match=says):
            RoutedModel.from_experts(
                mixed_experts, "retrieval", base_model=loaded, examples=EXAMPLES, then=name
            )
