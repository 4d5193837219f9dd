import torch

from mttl_routing.routers.stacked import Stacked


def vectors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {module: torch.randn(5, generator=generator) for module in ("q", "v")}


def same(vector: torch.Tensor) -> torch.Tensor:
    return vector


def rows_of(stacked: Stacked, module: str, names: list[str]) -> torch.Tensor:
    return stacked.rows(module, names).copied()


def test_an_expert_that_joins_is_the_only_one_copied_while_there_is_room():
    names = [f"e{n}" for n in range(24)]
    stacked = Stacked({name: vectors(n) for n, name in enumerate(names)}, same)
    copies = 0
    for n in range(24, 48):
        before, names = stacked.rows("q", names), [*names, f"e{n}"]
        stacked = stacked.changed({f"e{n}": vectors(n)}, ())
        after = stacked.rows("q", names)
        copies += after.keys.data_ptr() != before.keys.data_ptr()
    assert copies <= 8  # each makes room for an eighth more
    for module in ("q", "v"):
        expected = torch.stack([vectors(n)[module] for n in range(48)])
        assert torch.equal(rows_of(stacked, module, names), expected)


def test_those_who_hold_an_older_stack_are_not_disturbed():
    old = Stacked({"a": vectors(0), "b": vectors(1)}, same).changed({"c": vectors(2)}, ())
    one, other = (old.changed({"d": vectors(seed)}, ()) for seed in (3, 4))
    for stacked, last in ((one, 3), (other, 4)):
        expected = torch.stack([vectors(seed)["q"] for seed in (0, 1, 2, last)])
        assert torch.equal(rows_of(stacked, "q", ["a", "b", "c", "d"]), expected)
    assert torch.equal(rows_of(old, "q", ["c", "a"])[1], vectors(0)["q"])


def test_replacing_for_ever_takes_no_more_memory_and_gives_the_newest():
    stacked = Stacked({name: vectors(n) for n, name in enumerate("abc")}, same)
    for seed in range(10, 60):
        stacked = stacked.changed({"b": vectors(seed)}, ("b",))
        assert len(stacked._stacks["q"].rows) <= 7
        expected = torch.stack([vectors(n)["v"] for n in (0, seed, 2)])
        assert torch.equal(rows_of(stacked, "v", ["a", "b", "c"]), expected)


def test_what_is_left_when_an_expert_went_is_copied_once_and_the_old_let_go():
    stacked = Stacked({name: vectors(n) for n, name in enumerate("abcd")}, same)
    for left, changed in (
        (["a", "c", "d"], stacked.changed({}, ("b",))),
        (["a", "b", "c", "d"], stacked.changed({"b": vectors(7)}, ("b",))),
    ):
        some = changed.rows("q", left[:2])  # as while the others are switched off
        assert changed.rows("q", left[:2]) is not some
        rows = changed.rows("q", left)
        assert changed.rows("q", left) is rows
        assert changed._stacks["q"].rows is rows
        assert len(rows) == len(left)
    assert stacked.rows("q", list("abcd")) is stacked._stacks["q"].rows
