"""Routers trained on the data of the experts that they choose among, and what is kept of it."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from mttl_experts import ExpertLibrary
from mttl_routing import RoutedModel, learning
from tests.routing.two_kinds import accuracy, rows_of, two_experts

STEPS = {"softmax": 200, "product_key": 200, "mlp": 200, "poly": 40, "mhr": 40}


@pytest.fixture(scope="module")
def experts(make_expert):
    return two_experts(make_expert)


@pytest.fixture(scope="module")
def data(base, experts):
    """Batches of each expert, by its name."""
    return {
        expert.name: [rows_of(base, expert, kind, 100 * step) for step in range(8)]
        for kind, expert in enumerate(experts)
    }


@pytest.fixture
def library(experts, tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    for expert in experts:
        library.add_expert(expert)
    return library


@pytest.fixture
def trained(monkeypatch):
    """The mixtures that a router was trained on, one a training."""
    found = []
    real = learning.train

    def spy(routed, mixture, *args, **kwargs):
        found.append(mixture)
        return real(routed, mixture, *args, **kwargs)

    monkeypatch.setattr(learning, "train", spy)
    return found


def made(library, base, data, name="softmax", **options):
    options = {"top_k": 2, "gate_steps": 4} | options
    return RoutedModel.from_library(library, name, base_model=base, batches=data, **options)


@pytest.mark.parametrize("name", STEPS)
def test_it_finds_the_expert_of_each_kind(library, base, data, name):
    options = {"combine": "before" if name == "mhr" else "after", "temperature": 0.1}
    with RoutedModel.from_library(library, name, 2, base_model=base, **options) as routed:
        assert accuracy(routed) < 0.8
    with made(library, base, data, name, gate_steps=STEPS[name], **options) as routed:
        assert accuracy(routed) > 0.9


def test_what_it_learned_is_kept_with_the_experts_and_never_stale(
    library, base, data, make_expert, trained
):
    with made(library, base, data) as routed:
        first = {key: value.clone() for key, value in routed.router.state_dict().items()}
    with made(ExpertLibrary(library.uri), base, data) as routed:
        assert len(trained) == 1
        for key, value in routed.router.state_dict().items():
            assert torch.equal(value, first[key]), key
    for other in (
        {"gate_steps": 5},
        {"top_k": 3},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"threshold": 0.1},
        {"null": True},
        {"seed": 1},
        {"hidden": 32},
        {"granularity": "block"},
        {"combine": "before"},
        {"dtype": torch.bfloat16},
        {"name": "mlp"},
        {"data": data | {"bert": data["bert"][:3]}},
    ):
        before = len(trained)
        for _ in range(2):
            made(**({"library": library, "base": base, "data": data} | other)).remove()
        assert len(trained) == before + 1, other
    made(library, base, data, "rkhs", tasks=["sum"], heads=2).remove()  # as softmax, which has none
    assert len(trained) == before + 1
    library.replace_expert(make_expert("bert", seed=3))
    made(library, base, data).remove()
    assert len(trained) == before + 2


def test_the_names_of_the_experts_are_part_of_what_it_learned(library, base, data, trained):
    made(library, base, data).remove()
    one, other = (library[name] for name in data)
    library.replace_expert(replace(one, expert_info=other.expert_info))
    library.replace_expert(replace(other, expert_info=one.expert_info))
    made(library, base, data).remove()
    assert len(trained) == 2


def test_the_tasks_are_part_of_what_it_learned(make_expert, base, data, trained, tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    library.add_expert(make_expert("anna", task="sum"))
    library.add_expert(make_expert("bert", task="sort"))
    named = {
        name: [batch | {"task_names": "sum"} for batch in batches] for name, batches in data.items()
    }
    made(library, base, named, "poly").remove()
    assert trained[0][0]["task_names"] == ("sum",) * 4
    made(library, base, named, "poly", tasks=["sort", "sum"]).remove()  # as they are by default
    assert len(trained) == 1
    made(library, base, named, "poly", tasks=["sum", "sort"]).remove()
    assert len(trained) == 2
    for task in ("name", ("name", "sort")):  # of the same weights
        library.replace_expert(make_expert("bert", task=task))
        made(library, base, named, "poly").remove()
    assert len(trained) == 4


def test_a_library_that_cannot_be_written_to_gives_a_trained_router(library, base, data, trained):
    reader = ExpertLibrary(library.uri, read_only=True)
    for _ in range(2):
        with made(reader, base, data) as routed:
            assert isinstance(routed, RoutedModel)
    assert len(trained) == 2


def test_all_experts_take_turns_in_an_order_of_the_seed(library, base, data, trained):
    seen = []
    tell = lambda *told: seen.append(told)  # noqa: E731
    made(library, base, data, gate_steps=7, progress=tell).remove()
    assert seen == [("training the router", n, 7) for n in range(1, 8)]
    whose = {batch["input_ids"].data_ptr(): name for name, own in data.items() for batch in own}
    names = [whose[batch["input_ids"].data_ptr()] for batch in trained[0]]
    for at in range(0, 6, 2):
        assert set(names[at : at + 2]) == set(data)
    rounds = [[f"{e}{n}" for n in range(2)] for e in range(5)]
    orders = []
    for seed in (0, 0, 1):
        order = list(islice(learning.in_turn(rounds, seed), 20))
        for start in range(0, 20, 5):
            number = (start // 5) % 2
            assert set(order[start : start + 5]) == {own[number] for own in rounds}
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:5] != [own[0] for own in rounds]


def test_by_default_each_expert_has_a_step(library, base, data, trained, monkeypatch):
    for fewest, steps in ((1, 2), (3, 3)):
        monkeypatch.setattr(learning, "STEPS", fewest)
        made(library, base, data, gate_steps=None).remove()
        assert len(trained.pop()) == steps
    with pytest.raises(ValueError, match="gate_steps is 0; it must be at least 1"):
        made(library, base, data, gate_steps=0)


@pytest.mark.parametrize("name", ["softmax", "product_key"])
def test_one_expert_a_token_teaches_nothing_and_is_refused(library, base, data, trained, name):
    for options in ({}, {"null": True}):
        with pytest.raises(ValueError, match="would teach it nothing; take top_k=2"):
            made(library, base, data, name, top_k=1, **options)
    assert library.refresh().artifacts.entries() == []


def test_it_comes_back_from_a_folder_without_the_data(library, base, data, tokens, tmp_path):
    with made(library, base, data) as routed, torch.no_grad():
        expected = routed(tokens).logits
        routed.save_pretrained(tmp_path / "routed")
    with RoutedModel.from_pretrained(tmp_path / "routed", base_model=base) as routed:
        assert torch.equal(routed(tokens).logits, expected)


def test_it_comes_back_without_an_expert_that_was_removed(library, base, data, tokens, tmp_path):
    for name in ("softmax", "mlp", "poly"):
        with made(library, base, data, name) as routed, torch.no_grad():
            routed.remove_expert("anna")
            expected = routed(tokens).logits
            routed.save_pretrained(tmp_path / name)
        with RoutedModel.from_pretrained(tmp_path / name, base_model=base) as routed:
            assert torch.equal(routed(tokens).logits, expected)


def test_a_mode_is_left_as_it_was(library, base, data):
    base.train()
    try:
        for _ in range(2):  # trained, and loaded
            with made(library, base, data, "poly") as routed:
                assert not routed.router.training
                assert routed.model.training
    finally:
        base.eval()


def test_rows_of_an_expert_of_two_tasks_must_name_theirs(base, make_expert, data, trained):
    both = make_expert("anna", task=("sum", "sort"))
    with pytest.raises(ValueError, match="'anna' has 2 tasks, and its batches do not say which"):
        RoutedModel.from_experts([both], "poly", base_model=base, batches=data)
    named = [batch | {"task_names": ("sum", "sort", "sum", "sum")} for batch in data["anna"]]
    with pytest.raises(ValueError, match="of expert 'anna' has 4 rows and 1 task_names"):
        RoutedModel.from_experts(
            [both], "poly", base_model=base,
            batches={"anna": [data["anna"][0] | {"task_names": ("sum",)}]},
        )  # fmt: skip
    batches = {"anna": named}
    made = RoutedModel.from_experts([both], "poly", base_model=base, batches=batches, gate_steps=1)
    made.remove()
    assert trained[0][0]["task_names"] == ("sum", "sort", "sum", "sum")


def test_an_expert_without_data_is_named_and_the_base_is_left_as_it_was(experts, base, data):
    for name in data:
        others = {other: batches for other, batches in data.items() if other != name}
        for given in (others, others | {name: []}):
            with pytest.raises(ValueError, match=f"no batches were given for expert '{name}'"):
                RoutedModel.from_experts(experts, "mlp", base_model=base, batches=given)
    RoutedModel.from_experts(experts, base_model=base).remove()


def test_a_router_that_learns_is_not_taken_untrained_for_the_experts_that_were_found(
    experts, base, tokenizer
):
    with pytest.raises(ValueError, match="router 'softmax' learns; give then= one that is trained"):
        RoutedModel.from_experts(
            experts, "retrieval", base_model=base, tokenizer=tokenizer, then="softmax",
            examples={"anna": ["add"], "bert": ["sort"]},
        )  # fmt: skip
