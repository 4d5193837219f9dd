"""A routed model as a folder, and what it recorded as a file."""

import copy
import json

import pytest
import torch
from torch import Tensor

from mttl_adapters.base_models import BaseModel, fingerprint
from mttl_experts import ExpertLibrary, IncompatibleExpertError, IncompatibleExpertWarning
from mttl_routing import RoutedModel, Uniform


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


class Scaled(torch.nn.Module):
    """A router with an option and a parameter, found again by import."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def options(self):
        return {"scale": self.scale}

    def gates(self, x, layer, rows):
        return Uniform().gates(x, layer, rows) * self.scale * self.weight


@pytest.mark.parametrize("router", ["arrow", "uniform", "oracle"])
def test_a_saved_model_gives_the_same_logits_bit_for_bit(
    base, mixed_experts, make_expert, tokens, tmp_path, router
):
    folder = tmp_path / "models" / "routed"
    named = {"task_names": "cleo"}
    with RoutedModel.from_experts(
        mixed_experts, router, top_k=2, temperature=0.7, granularity="block", base_model=base
    ) as routed:
        if router != "arrow":
            routed.add_expert(make_expert("aaron", rank=3))  # not in the order of names
        routed.disable("bert")
        expected = logits_of(routed, tokens, **named)
        routed.save_pretrained(folder)
        routed.save_pretrained(folder)  # over itself
        experts = routed.experts
    with RoutedModel.from_pretrained(folder, base_model=copy.deepcopy(base)) as routed:
        assert routed.experts == experts
        assert routed.enabled == tuple(name for name in experts if name != "bert")
        assert routed.granularity == "block"
        assert torch.equal(logits_of(routed, tokens, **named), expected)
        routed.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/routed_model.json").read_text() == (
        folder / "routed_model.json"
    ).read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["routed"]


def test_a_model_from_a_library_keeps_its_base_out_and_its_prototypes_in(
    base, mixed_experts, tokens, tmp_path, monkeypatch
):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    with RoutedModel.from_library(library, base_model=base, dtype=torch.bfloat16) as routed:
        expected = logits_of(routed, tokens)
        routed.save_pretrained(tmp_path / "routed")
    kept = ExpertLibrary(f"local://{tmp_path}/routed/experts", read_only=True)
    assert {kept.digest(name) for name in kept} == {library.digest(name) for name in library}
    assert kept.artifacts.entries()
    with RoutedModel.from_pretrained(tmp_path / "routed", base_model=base) as routed:
        assert torch.equal(logits_of(routed, tokens), expected)


def test_a_router_of_one_s_own_is_imported_only_with_leave(
    base, mixed_experts, tokens, tmp_path, monkeypatch
):
    (tmp_path / "someones_router.py").write_text(
        "import torch\nRAN = True\n"
        "class Scaled(torch.nn.Module):\n"
        "    def __init__(self, scale):\n"
        "        super().__init__()\n"
        "        self.scale, self.weight = scale, torch.nn.Parameter(torch.zeros(()))\n"
        "    def options(self):\n        return {'scale': self.scale}\n"
        "    def gates(self, x, layer, rows):\n"
        "        return (self.scale * self.weight).expand(len(x), len(layer.experts))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import someones_router

    router = someones_router.Scaled(0.5)
    torch.nn.init.constant_(router.weight, 3.0)
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        expected = logits_of(routed, tokens)
        routed.save_pretrained(tmp_path / "routed")
    monkeypatch.delitem(__import__("sys").modules, "someones_router")
    with pytest.raises(ValueError, match=r"'someones_router:Scaled'.*trust_router=True"):
        RoutedModel.from_pretrained(tmp_path / "routed", base_model=base)
    assert "someones_router" not in __import__("sys").modules
    for more in ({"trust_router": True}, {"router": someones_router.Scaled(0.5)}):
        with RoutedModel.from_pretrained(tmp_path / "routed", base_model=base, **more) as routed:
            assert routed.router.weight.item() == 3.0
            assert torch.equal(logits_of(routed, tokens), expected)


def test_a_router_that_cannot_be_imported_can_be_given(base, mixed_experts, tmp_path):
    class Here(Scaled):
        pass

    with RoutedModel.from_experts(mixed_experts, Here(2.0), base_model=base) as routed:
        routed.save_pretrained(tmp_path / "routed")
    load = RoutedModel.from_pretrained
    with pytest.raises(ImportError, match="give router="):
        load(tmp_path / "routed", base_model=base, trust_router=True)
    with load(tmp_path / "routed", base_model=base, router=Here(2.0)) as routed:
        assert routed.router.scale == 2.0


def test_another_base_is_refused_and_other_weights_are_told(base, mixed_experts, tmp_path):
    def loaded(model, name):
        return BaseModel(model, None, name, None, fingerprint(model), "t" * 64, None)

    with RoutedModel.from_experts(
        mixed_experts, "uniform", base_model=loaded(base, "tests/two-layer-llama")
    ) as routed:
        routed.save_pretrained(tmp_path / "routed")
    other = copy.deepcopy(base)
    other.lm_head.weight += 1.0
    load = RoutedModel.from_pretrained
    with pytest.raises(IncompatibleExpertError, match=r"two-layer-llama.*'someone/phi'"):
        load(tmp_path / "routed", base_model=loaded(other, "someone/phi"))
    with pytest.warns(IncompatibleExpertWarning, match="other weights of the base"):
        load(tmp_path / "routed", base_model=other).remove()


def test_what_is_not_a_routed_model_is_refused(base, mixed_experts, make_expert, tmp_path):
    load = RoutedModel.from_pretrained
    with pytest.raises(FileNotFoundError, match="holds no routed model"):
        load(tmp_path / "nothing", base_model=base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        with pytest.raises(FileExistsError, match="holds something else"):
            routed.save_pretrained(tmp_path / "full")
        routed.save_pretrained(tmp_path / "routed")
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    record = tmp_path / "routed/routed_model.json"
    newer = json.loads(record.read_text()) | {"format": 2}
    ExpertLibrary(f"local://{tmp_path}/routed/experts").replace_expert(make_expert("anna", seed=7))
    with pytest.raises(ValueError, match="'anna'.*is another than the one saved"):
        load(tmp_path / "routed", base_model=base)
    record.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"format 2.*reads 1; upgrade"):
        load(tmp_path / "routed", base_model=base)


# Traces


def test_a_trace_has_every_weight_of_every_token_that_counts(base, mixed_experts, tmp_path):
    class Few:
        """Token by token: a third to the first expert, two to the third; the rest nothing."""

        def gates(self, x, layer, rows):
            return torch.tensor([[1.0, 0.0, 2.0, 0.0]]).div(3).expand(len(x), 4)

    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with RoutedModel.from_experts(mixed_experts, Few(), base_model=base) as routed:
        logits_of(routed, ids)
        with routed.trace() as trace:
            cache = routed(ids, attention_mask=mask, use_cache=True).past_key_values
            more = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
            logits_of(routed, ids[:, :1], attention_mask=more, past_key_values=cache)
        logits_of(routed, ids)
        layers = sorted(routed._hooks.roster.banks)
    table = trace.table()
    assert len(trace) == len(table["weight"]) == len(layers) * 2 * (6 + 2)
    lines = set(zip(*(table[name] for name in ("call", "row", "position", "layer", "expert")),
                    strict=True))  # fmt: skip
    places = [(0, 0, 2), (0, 0, 3), *[(0, 1, n) for n in range(4)], (1, 0, 4), (1, 1, 4)]
    assert lines == {
        (*place, layer, name) for place in places for layer in layers for name in ("anna", "cleo")
    }
    assert {round(weight, 5) for weight in table["weight"]} == {0.33333, 0.66667}
    for share in trace.shares().values():
        assert share == pytest.approx({"anna": 1 / 3, "bert": 0, "cleo": 2 / 3, "dora-the-name": 0})
    for best in trace.best().values():
        assert best == {"anna": 0, "bert": 0, "cleo": 1, "dora-the-name": 0}
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    trace.save(tmp_path / "trace.parquet")
    read = parquet.read_table(tmp_path / "trace.parquet").to_pydict()
    assert read.pop("weight") == pytest.approx(table.pop("weight"))
    assert read == table


def test_a_trace_of_a_generation_has_what_was_decided_for_the_rows(base, mixed_experts, tokens):
    with (
        RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed,
        routed.trace() as trace,
    ):
        routed.generate(
            tokens, task_names=["bert", "anna", None], max_new_tokens=3, do_sample=False,
            num_beams=2,
        )  # fmt: skip
    table = trace.table()
    assert set(table["call"]) == {0, 1, 2}
    of_row = dict(zip(table["row"], table["expert"], strict=True))
    assert of_row == {0: "bert", 1: "bert", 2: "anna", 3: "anna"}


def test_experts_of_one_weight_share_a_token_and_nobody_has_one_that_the_base_keeps(
    base, mixed_experts, tokens
):
    class Halves:
        """Every other token to two experts alike, the rest to none."""

        def gates(self, x, layer, rows):
            even = torch.arange(len(x)).unsqueeze(1) % 2 == 0
            return torch.tensor([[0.5, 0.5, 0.0, 0.0]]) * even

    with (
        RoutedModel.from_experts(mixed_experts, Halves(), base_model=base) as routed,
        routed.trace() as trace,
    ):
        logits_of(routed, tokens[:, :8])
    for best in trace.best().values():
        assert best == {"anna": 0.25, "bert": 0.25, "cleo": 0, "dora-the-name": 0}


def test_a_router_fitted_to_data_is_to_be_given_again(base, mixed_experts, tokens, tmp_path):
    batches = {expert.name: [{"input_ids": tokens}] for expert in mixed_experts}
    made = RoutedModel.from_experts(mixed_experts, "centroid", base_model=base, batches=batches)
    with made as routed:
        expected, router = logits_of(routed, tokens), routed.router
        routed.save_pretrained(tmp_path / "routed")
    load = RoutedModel.from_pretrained
    with pytest.raises(TypeError, match=r"cannot be made from what was saved.*give router="):
        load(tmp_path / "routed", base_model=base, trust_router=True)
    with load(tmp_path / "routed", base_model=base, router=router) as routed:
        assert torch.equal(logits_of(routed, tokens), expected)
