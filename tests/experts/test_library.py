import dataclasses
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mttl_experts import (
    BlobExpertLibrary,
    Expert,
    ExpertExistsError,
    ExpertInfo,
    ExpertLibrary,
    ExpertNotFoundError,
    HFExpertLibrary,
    IncompatibleExpertError,
    LocalExpertLibrary,
    VirtualLocalLibrary,
)
from mttl_storage import Conflict, Corrupt, NotFound, ReadOnly


def same(one, other):
    """Whether two experts have equal facts and equal tensors."""
    first, second = dict(one.expert_weights or {}), dict(other.expert_weights or {})
    return (
        one.expert_info == other.expert_info
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


def bare(name, task=None, **facts):
    return Expert(expert_info=ExpertInfo(name, task, **facts))


# The API of the README, and what it promises.


def test_the_readme_api_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = ExpertLibrary(repo_id="my_repo", token="my_token", create=True)
    info = ExpertInfo(expert_name="my_expert", expert_task_name="my_task")
    expert = Expert(expert_info=info)
    library.add_expert(expert)
    assert library.get_expert("my_expert").expert_info == info
    copy = ExpertLibrary.get_expert_library(
        repo_id="my_repo", token="my_token", destination_id="local://my_copy"
    )
    library.remove_expert("my_expert")
    assert len(library) == 0
    assert copy.keys() == ["my_expert"]
    assert (tmp_path / "my_copy" / ".mttl").is_dir()


def test_an_expert_comes_back_as_it_was_added(library, make_expert):
    expert = make_expert("e1", task="t")
    digest = library.add_expert(expert)
    assert digest == expert.digest == library.digest("e1") == library.get_expert("e1").digest
    assert same(library["e1"], expert)
    assert same(ExpertLibrary(library.uri)["e1"], expert)


def test_files_lie_under_name_and_digest_as_a_peft_folder(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path / "lib"), create=True)
    digest = library.add_expert(make_expert("e1"))
    folder = tmp_path / "lib" / "experts" / "e1" / digest
    assert library.path("e1") == folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_ids_without_a_scheme_belong_to_the_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "lib"
    for given in ("sub/lib", "./sub/../sub/lib", "local://sub/lib", str(path), f"local://{path}"):
        assert ExpertLibrary(given, create=True).uri == f"local://{path}"
        assert LocalExpertLibrary(given).uri == f"local://{path}"
    name = f"lib-{id(tmp_path)}"
    assert VirtualLocalLibrary(name, create=True).uri == f"virtual://{name}"
    assert ExpertLibrary(f"virtual://{name}").uri == f"virtual://{name}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sub"]


@pytest.mark.parametrize(("kind", "scheme"), [(BlobExpertLibrary, "az"), (HFExpertLibrary, "hf")])
def test_ids_of_the_clouds_are_written_without_a_scheme(new_address, make_expert, kind, scheme):
    uri = new_address(scheme)
    library = kind(uri.removeprefix(f"{scheme}://"), create=True)
    library.add_expert(make_expert("e1"))
    assert library.uri == uri
    assert same(ExpertLibrary(uri)["e1"], make_expert("e1"))


def test_a_missing_library_is_an_error_unless_it_is_to_be_created(address):
    """FIELD: the process exits inside a constructor."""
    with pytest.raises(NotFound, match="library"):
        ExpertLibrary(address())
    assert len(ExpertLibrary(address(), create=True)) == 0


def test_the_order_of_arguments_is_that_of_the_older_api(library, address):
    for name, model in (("a", "m"), ("b", "m"), ("c", "m"), ("d", "other")):
        library.add_expert(bare(name, expert_model=model))
    view = ExpertLibrary.get_expert_library(library.uri, None, "m", ["a", "b", "d"], "b", False)
    assert view.keys() == ["a"]
    copy = ExpertLibrary.get_expert_library(
        library.uri, None, "m", None, None, False, address("copy")
    )
    assert copy.keys() == ["a", "b", "c"]


def test_facts_are_listed_without_reading_weights(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path), create=True)
    library.add_expert(make_expert("e1", task="t"))
    library.add_expert(bare("e2", ("t", "u"), tags=("x",)))
    for file in (tmp_path / "experts").rglob("*.safetensors"):
        file.unlink()
    again = LocalExpertLibrary(str(tmp_path))
    assert list(again.infos()) == ["e1", "e2"]
    assert again.tasks == ("t", "u")
    assert [e.name for e in again.get_experts_for_task("t")] == ["e1", "e2"]
    assert again.get_experts_for_task("T") == []
    with pytest.raises((Corrupt, NotFound), match="e1"):
        dict(again["e1"].expert_weights)


def test_weights_may_come_after_the_facts(library, make_expert):
    library.add_expert(bare("e1"))
    assert library["e1"].expert_weights is None
    with pytest.raises(ValueError, match=r"'e1' in .* has no weights yet"):
        library.path("e1")
    library.replace_expert(make_expert("e1"))
    assert same(library["e1"], make_expert("e1"))


# Finding


def test_an_unknown_name_is_an_error_with_near_ones(library):
    for name in ("arithmetic", "geometry", "history"):
        library.add_expert(bare(name))
    calls = [
        library.get_expert,
        library.__getitem__,
        library.digest,
        library.path,
        library.remove_expert,
        lambda name: library.rename_expert(name, "x"),
        lambda name: library.update_info(name, tags=("x",)),
        lambda name: library.replace_expert(bare(name)),
        lambda name: ExpertLibrary(library.uri, selection=[name]),
        lambda name: ExpertLibrary(library.uri, exclude_selection=name),
    ]
    for call in calls:
        with pytest.raises(ExpertNotFoundError, match=r"no expert 'aritmetic' in .*'arithmetic'"):
            call("aritmetic")
    assert "aritmetic" not in library
    assert len(library) == 3


def test_selection_is_by_exact_names_so_e10_does_not_select_e1(library):
    """FIELD: selection="e10" selects e1 too."""
    for name in ("e1", "e10", "e100", "f"):
        library.add_expert(bare(name))

    def shown(**filters):
        return ExpertLibrary(library.uri, **filters).keys()

    assert shown(selection="e10") == ["e10"]
    assert shown(selection=["e1"]) == ["e1"]
    assert shown(selection=" e1 , f") == ["e1", "f"]
    assert shown(exclude_selection="e10") == ["e1", "e100", "f"]
    assert shown(selection=["e1", "e10"], exclude_selection=["e1"]) == ["e10"]
    assert shown(selection=[]) == []


def test_a_filtered_view_is_read_only_unless_told_otherwise(library, make_expert):
    library.add_expert(make_expert("a"))
    library.add_expert(make_expert("b"))
    view = ExpertLibrary(library.uri, selection="a")
    changes = [
        lambda lib: lib.add_expert(bare("c")),
        lambda lib: lib.replace_expert(make_expert("a", seed=1)),
        lambda lib: lib.update_info("a", tags=("x",)),
        lambda lib: lib.rename_expert("a", "c"),
        lambda lib: lib.remove_expert("a"),
    ]
    for change in changes:
        with pytest.raises(ReadOnly, match=r"a part of a library.*read_only=False"):
            change(view)
    view.artifacts.put(view["a"], {"kind": "x"}, [1])  # derived data harms nobody
    locked = ExpertLibrary(library.uri, read_only=True)
    with pytest.raises(ReadOnly):
        locked.add_expert(bare("c"))
    with pytest.raises(ReadOnly):
        locked.artifacts.put(view["a"], {"kind": "y"}, [1])
    ExpertLibrary(library.uri, selection="a", read_only=False).remove_expert("a")
    assert library.refresh().keys() == ["b"]


def test_an_expert_not_shown_is_not_there(library):
    for name in ("a", "b"):
        library.add_expert(bare(name))
    view = ExpertLibrary(library.uri, selection="a")
    assert "b" not in view
    with pytest.raises(ExpertNotFoundError, match="'b'"):
        view.get_expert("b")
    assert [name for name, _ in view.items()] == ["a"]


def test_order_does_not_depend_on_threads(library):
    """FIELD: expert order depends on threads."""
    names = [f"e{i}" for i in range(12)]

    def add(name):
        ExpertLibrary(library.uri).add_expert(bare(name))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, reversed(names)))
    library.refresh()
    assert library.keys() == sorted(names)
    assert list(library) == list(library.infos()) == [n for n, _ in library.items()]
    assert [expert.name for expert in library.values()] == sorted(names)


# Changing


def test_an_add_is_one_commit(library, make_expert):
    """FIELD: three commits per add."""
    before = library.generation
    library.add_expert(make_expert("e1"))
    assert library.generation == before + 1
    library.rename_expert("e1", "e2")
    library.update_info("e2", tags=("x",))
    library.remove_expert("e2")
    assert library.generation == before + 4
    assert ExpertLibrary(library.uri).generation == before + 4


def test_adding_what_is_there_changes_nothing(library, make_expert):
    library.add_expert(make_expert("e1"))
    before = library.generation
    library.add_expert(make_expert("e1"))
    assert ExpertLibrary(library.uri).generation == before


def test_adding_another_expert_of_the_same_name_is_an_error(library, make_expert):
    library.add_expert(make_expert("e1"))
    for other in (make_expert("e1", seed=1), make_expert("e1", task="t"), bare("e1")):
        with pytest.raises(ExpertExistsError, match=r"'e1'.*replace_expert"):
            library.add_expert(other)
    assert same(library["e1"], make_expert("e1"))
    assert issubclass(ExpertExistsError, Conflict)


def test_names_that_would_be_parted_or_refused_by_a_disk_are_errors(library):
    for name in ("a/b", "a,b", "..", "/abs", "con", "e.", " e", "x" * 500):
        with pytest.raises(ValueError, match="name"):
            library.add_expert(bare(name))
    library.add_expert(bare("e1"))
    with pytest.raises(Conflict, match="E1"):
        library.add_expert(bare("E1"))
    with pytest.raises(ValueError, match="'a_b'"):
        library.rename_expert("e1", "a/b")
    assert library.keys() == ["e1"]


def test_an_adapter_that_attaches_to_nothing_is_not_added(library, make_expert):
    with pytest.raises(IncompatibleExpertError, match=r"'e1'.*attach to nothing"):
        library.add_expert(make_expert("e1", target_modules=[]))
    with pytest.raises(IncompatibleExpertError, match=r"'e1'.*match none of them"):
        library.add_expert(make_expert("e1", target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="'e1' has no tensor"):
        library.add_expert(Expert(make_expert("e1").expert_info, {}))
    assert len(library) == 0


def test_a_view_of_one_base_takes_no_expert_of_another(library, make_expert):
    library.add_expert(make_expert("e1"))
    view = ExpertLibrary(library.uri, model_name="test/llama", read_only=False)
    view.add_expert(make_expert("e2"))
    with pytest.raises(IncompatibleExpertError, match=r"'other'.*model_name='test/llama'"):
        view.add_expert(bare("e3", expert_model="other"))
    assert view.keys() == ["e1", "e2"]


def test_a_removed_expert_can_be_restored(library, make_expert):
    library.add_expert(make_expert("e1", task="t"))
    library.update_metrics("e1", {"loss": 1.5})
    before = library.get_expert("e1")
    library.remove_expert("e1")
    assert "e1" not in library
    library.restore_expert("e1")
    assert same(library["e1"], before)
    with pytest.raises(ExpertNotFoundError, match="'e2'"):
        library.restore_expert("e2")


def test_a_name_is_free_again_after_its_expert_was_removed(library, make_expert):
    library.add_expert(make_expert("e1"))
    library.remove_expert("e1")
    library.add_expert(make_expert("e1", seed=1))
    assert same(library["e1"], make_expert("e1", seed=1))


def test_renaming_keeps_files_and_facts(library, make_expert):
    library.add_expert(make_expert("e1", task="t"))
    library.add_expert(make_expert("e3", seed=1))
    path, digest = library.path("e1"), library.digest("e1")
    library.artifacts.put(library["e1"], {"kind": "x"}, [1])
    library.rename_expert("e1", "e2")
    assert library.keys() == ["e2", "e3"]
    assert library.digest("e2") == digest
    assert library.path("e2") == path
    assert library["e2"].expert_info == dataclasses.replace(
        make_expert("e1", task="t").expert_info, expert_name="e2"
    )
    assert library.repository.item("experts/e2").info["expert_name"] == "e2"
    assert library.artifacts.get(library["e2"], {"kind": "x"}) == [1]
    with pytest.raises(ExpertExistsError, match="'e3'"):
        library.rename_expert("e2", "e3")


def test_facts_that_may_change_do_and_others_do_not(library, make_expert):
    library.add_expert(make_expert("e1"))
    digest = library.digest("e1")
    library.update_metrics("e1", {"loss": 2.0, "accuracy": 0.5})
    library.update_metrics("e1", {"loss": 1.0})
    info = library.update_info("e1", tags=("x", "y"), expert_task_name="t")
    assert info == ExpertLibrary(library.uri)["e1"].expert_info
    assert info.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert (info.tags, info.tasks) == (("x", "y"), ("t",))
    assert library.digest("e1") == digest
    with pytest.raises(ValueError, match="rename_expert"):
        library.update_info("e1", expert_name="e2")
    with pytest.raises(ValueError, match=r"expert_config.*replace_expert"):
        library.update_info("e1", expert_config={})
    with pytest.raises(ValueError, match="no field 'metric'; did you mean 'metrics'"):
        library.update_info("e1", metric={})


def test_replacing_checks_what_is_replaced(library, make_expert):
    library.add_expert(make_expert("e1"))
    other = ExpertLibrary(library.uri)
    other.replace_expert(make_expert("e1", seed=1))
    with pytest.raises(Conflict):
        library.replace_expert(make_expert("e1", seed=2))
    library.refresh()
    assert same(library["e1"], make_expert("e1", seed=1))
    with pytest.raises(Conflict):
        library.replace_expert(make_expert("e1", seed=2), expected=make_expert("e1").digest)


def test_an_expert_at_hand_keeps_its_own_weights_when_it_is_replaced(library, make_expert):
    library.add_expert(make_expert("e1"))
    library.add_expert(make_expert("e2", seed=5))
    held, gone = library["e1"], library["e2"]
    library.replace_expert(make_expert("e1", seed=1))
    library.remove_expert("e2")
    assert same(held, make_expert("e1"))
    assert same(gone, make_expert("e2", seed=5))
    assert same(library["e1"], make_expert("e1", seed=1))


# Several writers


def test_a_batch_is_one_commit(library, make_expert):
    library.add_expert(bare("old"))
    before = library.generation
    with library.batch("three at once") as same_library:
        assert same_library is library
        library.add_expert(make_expert("e1"))
        library.add_expert(make_expert("e2", seed=1))
        library.remove_expert("old")
        library.artifacts.put(make_expert("e1"), {"kind": "x"}, [1])
        assert library.keys() == ["old"]
    assert library.generation == before + 1
    assert library.keys() == ["e1", "e2"]
    assert library.artifacts.get(library["e1"], {"kind": "x"}) == [1]
    assert library.repository.history()[-1].message == "three at once"


def test_a_batch_that_raises_leaves_nothing_and_is_not_left_open(library):
    """FIELD: a batch that stays open after an error."""
    library.add_expert(bare("old"))
    before = library.generation

    def fail():
        with library.batch():
            library.add_expert(bare("e1"))
            library.remove_expert("old")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert library.keys() == ["old"]
    assert ExpertLibrary(library.uri).generation == before
    library.add_expert(bare("e2"))  # at once, not in the batch that failed
    assert ExpertLibrary(library.uri).keys() == ["e2", "old"]


def test_batches_do_not_nest(library):
    with library.batch():
        with pytest.raises(RuntimeError, match="do not nest"), library.batch():
            pass
        library.add_expert(bare("e1"))
    assert library.keys() == ["e1"]


def test_two_writers_lose_nothing(library, make_expert):
    """FIELD: two writers lose rows."""
    expected = [f"{writer}{i}" for writer in "ab" for i in range(8)]
    start = threading.Barrier(2)

    def write(writer):
        mine = ExpertLibrary(library.uri)
        start.wait()
        for i in range(8):
            mine.add_expert(make_expert(f"{writer}{i}", seed=i))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    library.refresh()
    assert library.keys() == expected
    assert all(same(library[n], make_expert(n, seed=int(n[1:]))) for n in expected)
    assert library.repository.verify() == []


def test_two_writers_of_one_name_do_not_overwrite_each_other(library, make_expert):
    other = ExpertLibrary(library.uri)
    library.add_expert(make_expert("e1"))
    with pytest.raises(ExpertExistsError, match="'e1'"):
        other.add_expert(make_expert("e1", seed=1))
    assert same(other.refresh()["e1"], make_expert("e1"))


def test_create_does_not_wipe_a_virtual_library(make_expert, tmp_path):
    """FIELD: create=True wipes an in-memory library."""
    name = f"kept-{id(tmp_path)}"
    VirtualLocalLibrary(name, create=True).add_expert(make_expert("e1"))
    again = VirtualLocalLibrary(name, create=True)
    assert same(again["e1"], make_expert("e1"))


def test_create_does_not_wipe_a_local_library(tmp_path, make_expert):
    LocalExpertLibrary(str(tmp_path), create=True).add_expert(make_expert("e1"))
    assert LocalExpertLibrary(str(tmp_path), create=True).keys() == ["e1"]


# Copying


@pytest.mark.parametrize("target", ["local", "virtual"])
def test_destination_id_gives_the_copy_not_the_source(library, make_expert, tmp_path, target):
    """FIELD: destination_id returns the source."""
    library.add_expert(make_expert("e1", task="t"))
    library.add_expert(bare("e2"))
    library.artifacts.put(library["e1"], {"kind": "x"}, {"v": torch.ones(3)})
    destination = (
        f"local://{tmp_path / 'copy'}" if target == "local" else f"virtual://copy-{id(tmp_path)}"
    )
    copy = ExpertLibrary.get_expert_library(library.uri, destination_id=destination)
    assert copy.uri == destination
    assert copy.keys() == ["e1", "e2"]
    assert all(copy.digest(name) == library.digest(name) for name in library)
    assert all(same(copy[name], library[name]) for name in library)
    assert torch.equal(copy.artifacts.get(copy["e1"], {"kind": "x"})["v"], torch.ones(3))
    assert copy.repository.verify() == []
    copy.remove_expert("e1")
    assert "e1" in library.refresh()


def test_copying_again_brings_what_changed(library, make_expert, address):
    """FIELD: clone misses changed experts and prototypes."""
    library.add_expert(make_expert("e1"))
    library.add_expert(make_expert("e2", seed=1))
    library.copy_to(address("copy"))
    library.replace_expert(make_expert("e1", seed=7))
    library.update_info("e2", tags=("x",))
    library.artifacts.put(library["e1"], {"kind": "x"}, [7])
    library.add_expert(bare("e3"))
    copy = library.copy_to(address("copy"))
    assert copy.keys() == ["e1", "e2", "e3"]
    assert all(same(copy[name], library[name]) for name in library)
    assert copy.artifacts.get(copy["e1"], {"kind": "x"}) == [7]


def test_a_copy_of_a_part_holds_that_part_and_its_artifacts(library, make_expert, address):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make_expert(name, seed=seed))
    a, b, c = library.values()
    library.artifacts.put(a, {"kind": "x"}, ["a"])
    library.artifacts.put(b, {"kind": "x"}, ["b"])
    library.artifacts.put([a, c], {"kind": "x"}, ["ac"])
    library.artifacts.put([], {"kind": "x"}, ["base"])
    copy = ExpertLibrary.get_expert_library(
        library.uri, selection="a,c", destination_id=address("copy")
    )
    assert copy.keys() == ["a", "c"]
    assert copy.artifacts.get(a, {"kind": "x"}) == ["a"]
    assert copy.artifacts.get([c, a], {"kind": "x"}) == ["ac"]
    assert copy.artifacts.get([], {"kind": "x"}) == ["base"]
    assert copy.artifacts.get(b, {"kind": "x"}) is None
    copy.add_expert(bare("d"))


def test_a_library_is_not_copied_to_itself(library):
    with pytest.raises(ValueError, match="cannot be copied to itself"):
        library.copy_to(library.uri)


def test_a_second_change_in_a_batch_sees_the_first(library):
    library.add_expert(bare("a"))
    library.add_expert(bare("b"))
    with library.batch():
        library.update_metrics("a", {"x": 1.0})
        library.update_metrics("a", {"y": 2.0})
        library.rename_expert("a", "c")
        library.update_info("c", tags=("t",))
        library.add_expert(bare("new", metrics={"x": 1}))
        library.update_metrics("new", {"x": 2})
        library.remove_expert("b")
        with pytest.raises(ExpertNotFoundError, match="'b'"):
            library.update_info("b", tags=("t",))
        library.add_expert(bare("b", "again"))
    assert library.keys() == ["b", "c", "new"]
    assert library["c"].expert_info == ExpertInfo("c", metrics={"x": 1.0, "y": 2.0}, tags=("t",))
    assert library["new"].expert_info.metrics == {"x": 2}
    assert library["b"].expert_info.tasks == ("again",)


def test_a_library_goes_to_another_process(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path), token="s3cret", create=True)
    library.add_expert(make_expert("e1"))
    content = pickle.dumps(library)
    assert b"s3cret" not in content
    assert same(pickle.loads(content)["e1"], make_expert("e1"))
    assert same(pickle.loads(pickle.dumps(library["e1"])), make_expert("e1"))


def test_facts_at_hand_are_the_callers_own(library, make_expert):
    library.add_expert(make_expert("e1"))
    info = library.infos()["e1"]
    info.expert_config["target_modules"].append("x")
    info.metrics["x"] = 1
    assert library.infos()["e1"] == make_expert("e1").expert_info


def test_all_weights_are_loaded_together(library, make_expert):
    for seed, name in enumerate("abc"):
        library.add_expert(make_expert(name, seed=seed))
    library.add_expert(bare("d"))
    loaded = ExpertLibrary(library.uri).load()
    assert list(loaded) == ["a", "b", "c", "d"]
    assert all("tensors" in repr(loaded[name].expert_weights) for name in "abc")
    assert all(same(loaded[name], library[name]) for name in loaded)
    assert list(library.load(["c", "a"])) == ["a", "c"]
    with pytest.raises(ExpertNotFoundError, match="'e'"):
        library.load(["e"])
