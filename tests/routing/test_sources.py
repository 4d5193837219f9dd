"""Routed models whose banks are mapped from files, and what stays in memory of either kind."""

import pytest
import torch
from torch import Tensor

from mttl_adapters import BankFiles
from mttl_experts import Expert, ExpertLibrary, IncompatibleExpertError, UnsupportedAdapterError
from mttl_routing import RoutedModel

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.fixture
def library(tmp_path, mixed_experts):
    library = ExpertLibrary(f"local://{tmp_path / 'library'}", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    return library


def stamps(files: BankFiles) -> dict[str, tuple[int, int]]:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files.folder.iterdir()}


@pytest.mark.parametrize(
    ("router", "combine", "resident_bytes"),
    [
        ("arrow", "after", None),
        ("arrow", "after", 0),
        ("arrow", "before", None),
        ("spectr", "after", 0),
        ("uniform", "after", 0),
        ("uniform", "before", None),
    ],
)
def test_banks_from_files_give_what_banks_in_memory_give(
    base, mixed_experts, make_expert, tokens, tmp_path, router, combine, resident_bytes
):
    experts = mixed_experts
    other = make_expert("anna", seed=99, rank=9, targets=("gate_proj", "v_proj"))
    if combine == "before":  # which wants equal ranks
        experts = [make_expert(name) for name in ("anna", "bert", "cleo")]
        other = make_expert("anna", seed=99, targets=("gate_proj", "v_proj"))
    more = make_expert("evan", targets=("k_proj", "v_proj"))
    files = BankFiles(tmp_path, resident_bytes=resident_bytes)
    found: list[list[Tensor]] = []
    for given in (None, files):
        with RoutedModel.from_experts(
            experts, router, 2, combine, base_model=base, bank_files=given
        ) as routed:
            steps = [logits_of(routed, tokens), logits_of(routed, tokens)]
            routed.disable("bert")
            steps.append(logits_of(routed, tokens))
            routed.enable()
            routed.add_expert(more)
            steps.append(logits_of(routed, tokens))
            routed.replace_expert(other)
            steps.append(logits_of(routed, tokens))
            routed.remove_expert("cleo")
            steps.append(logits_of(routed, tokens))
            found.append(steps)
    for in_memory, mapped in zip(*found, strict=True):
        torch.testing.assert_close(mapped, in_memory, **CLOSE)
    assert len(list(files.folder.iterdir())) == len(experts) + 2


def test_files_that_are_there_are_read_and_the_experts_are_not(base, library, tokens, tmp_path):
    files = BankFiles(tmp_path / "banks")
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        expected = logits_of(routed, tokens)
    before = stamps(files)
    experts = list(library.values())
    files = BankFiles(tmp_path / "banks")
    with RoutedModel.from_experts(experts[::-1], "uniform", base_model=base, bank_files=files):
        assert stamps(files) == before
    assert {repr(e.expert_weights) for e in experts} == {"LazyTensors(not read yet)"}
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        torch.testing.assert_close(logits_of(routed, tokens), expected, rtol=0, atol=0)
        routed.replace_expert(library["anna"])
        assert stamps(files) == before


def test_a_file_that_was_damaged_is_written_again(base, library, tokens, tmp_path):
    files = BankFiles(tmp_path / "banks")
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        expected = logits_of(routed, tokens)
    path = files.folder / f"{library.digest('cleo')}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        torch.testing.assert_close(logits_of(routed, tokens), expected, rtol=0, atol=0)


def test_a_saved_model_is_loaded_from_files_in_its_dtype(base, library, tokens, tmp_path):
    files = BankFiles(tmp_path / "banks", dtype=torch.bfloat16)
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        expected = logits_of(routed, tokens)
        routed.save_pretrained(tmp_path / "saved")
    for given in (None, files):
        with RoutedModel.from_pretrained(
            tmp_path / "saved", base_model=base, bank_files=given
        ) as routed:
            assert {bank.dtype for bank in routed._hooks.roster.banks.values()} == {torch.bfloat16}
            torch.testing.assert_close(logits_of(routed, tokens), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"got dtype torch.bfloat16 and bank files of torch.float"):
        RoutedModel.from_pretrained(
            tmp_path / "saved", base_model=base, bank_files=BankFiles(tmp_path / "banks")
        )


def test_a_model_that_is_moved_to_another_dtype_keeps_its_files(base, library, tokens, tmp_path):
    files, found = BankFiles(tmp_path / "banks"), []
    for given in (None, files):
        with RoutedModel.from_library(library, base_model=base, bank_files=given) as routed:
            before = logits_of(routed, tokens)
            wide = logits_of(routed.to(torch.float64), tokens)
            torch.testing.assert_close(logits_of(routed.to(torch.float32), tokens), before, **CLOSE)
            found.append(wide)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("mapped", [False, True])
def test_experts_of_a_library_are_not_in_memory_beside_their_banks(
    base, library, tokens, tmp_path, mapped
):
    files = BankFiles(tmp_path / "banks") if mapped else None
    with RoutedModel.from_library(library, base_model=base, bank_files=files) as routed:
        logits_of(routed, tokens)
        routed.replace_expert(library["anna"])
        routed.save_pretrained(tmp_path / "saved")
        experts = routed._hooks.roster.experts
        assert {repr(e.expert_weights) for e in experts} == {"LazyTensors(not read yet)"}
        assert [e.digest for e in experts] == [library.digest(e.name) for e in experts]


def test_mapped_factors_are_never_stacked(base, mixed_experts, tokens, tmp_path):
    files = BankFiles(tmp_path)
    with RoutedModel.from_experts(
        mixed_experts, "uniform", base_model=base, bank_files=files
    ) as routed:
        logits_of(routed, tokens)
        for bank in routed._hooks.roster.banks.values():
            assert not {"a", "b"} & set(vars(bank))


def test_what_does_not_fit_is_named_by_its_experts(base, make_expert, mixed_experts, tmp_path):
    anna = mixed_experts[0]
    weights = {
        name: value[:, :-1] if "lora_A" in name else value
        for name, value in anna.expert_weights.items()
    }
    narrow = Expert(make_expert("zoe").expert_info, weights)
    empty = Expert(make_expert("zoe").expert_info)
    for given in (None, BankFiles(tmp_path)):
        with pytest.raises(IncompatibleExpertError, match=r"q_proj' is \(32, 32\).*'anna'.*'zoe'"):
            RoutedModel.from_experts([anna, narrow], "uniform", base_model=base, bank_files=given)
        with pytest.raises(IncompatibleExpertError, match=r"q_proj' has 32 in.*'anna'.*'zoe'"):
            RoutedModel.from_experts([anna, narrow], base_model=base, bank_files=given)
        with pytest.raises(UnsupportedAdapterError, match="'zoe' has no weights"):
            RoutedModel.from_experts([anna, empty], "uniform", base_model=base, bank_files=given)


def test_experts_come_and_go_after_a_forward_in_inference_mode(
    base, mixed_experts, make_expert, tokens, tmp_path
):
    with RoutedModel.from_experts(
        mixed_experts, base_model=base, bank_files=BankFiles(tmp_path, resident_bytes=0)
    ) as routed:
        with torch.inference_mode():
            before = routed(tokens).logits
        torch.testing.assert_close(logits_of(routed, tokens), before, **CLOSE)
        routed.add_expert(make_expert("evan"))
        routed.remove_expert("evan")
        torch.testing.assert_close(logits_of(routed, tokens), before, **CLOSE)
