"""Two clients of one repository against a dict, in any order of steps."""

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mttl_storage import Conflict, NotFound, Repository

NAMES = st.sampled_from(["a", "b", "d/e", "experts/g", "experts/h"])
CONTENT = st.binary(max_size=2)
CLIENTS = st.integers(0, 1)


class TwoClients(RuleBasedStateMachine):
    """Each client sees a copy of the model from when it last wrote or refreshed."""

    def __init__(self, uri, count):
        super().__init__()
        self.uri, self.count = uri, count
        self.clients = [Repository.open(self.uri, create=True) for _ in range(2)]
        self.model, self.gone = {}, {}
        self.changed = {}  # name -> generation of its last change, if anything is known of it
        self.seen = [{}, {}]  # the same, as each client last saw it
        self.generation = 0

    def expect(self, client, names, wanted, action):
        """Do one step in the repository and say whether the model should follow.

        wanted: an error the newest state calls for, "same" for no change, or "change".
        """
        repository = self.clients[client]
        stale = any(self.changed.get(name) != self.seen[client].get(name) for name in names)
        try:
            action(repository)
        except (Conflict, NotFound) as error:
            assert stale or wanted is type(error), (wanted, error)
            return False
        assert wanted in ("same", "change")
        assert not (stale and wanted == "change")
        if wanted == "change":
            self.generation += 1
            self.changed.update(dict.fromkeys(names, self.generation))
        assert repository.generation == self.generation
        self.seen[client] = dict(self.changed)
        return wanted == "change"

    @rule(client=CLIENTS, name=NAMES, content=CONTENT)
    def add(self, client, name, content):
        there = self.model.get(name)
        wanted = "change" if there is None else "same" if there == (content, {}) else Conflict
        if self.expect(client, [name], wanted, lambda r: r.add(name, {"f": content})):
            self.model[name] = (content, {})
            self.gone.pop(name, None)

    @rule(client=CLIENTS, name=NAMES, content=CONTENT)
    def replace(self, client, name, content):
        there = self.model.get(name)
        wanted = NotFound if there is None else "same" if there[0] == content else "change"
        if self.expect(client, [name], wanted, lambda r: r.replace(name, {"f": content})):
            self.model[name] = (content, there[1])

    @rule(client=CLIENTS, name=NAMES, number=st.integers(0, 2))
    def update_info(self, client, name, number):
        info = {"n": number}
        there = self.model.get(name)
        wanted = NotFound if there is None else "same" if there[1] == info else "change"
        if self.expect(client, [name], wanted, lambda r: r.update_info(name, info)):
            self.model[name] = (there[0], info)

    @rule(client=CLIENTS, name=NAMES)
    def remove(self, client, name):
        wanted = "change" if name in self.model else NotFound
        if self.expect(client, [name], wanted, lambda r: r.remove(name)):
            self.gone[name] = self.model.pop(name)

    @rule(client=CLIENTS, name=NAMES)
    def restore(self, client, name):
        known = "same" if name in self.model else "change" if name in self.gone else NotFound
        if self.expect(client, [name], known, lambda r: r.restore(name)):
            self.model[name] = self.gone.pop(name)

    @rule(client=CLIENTS, old=NAMES, new=NAMES)
    def rename(self, client, old, new):
        if old not in self.model:
            wanted = NotFound
        elif old == new:
            wanted = "same"
        else:
            wanted = Conflict if new in self.model else "change"
        if self.expect(client, [old, new], wanted, lambda r: r.rename(old, new)):
            self.model[new] = self.model.pop(old)
            self.gone.pop(new, None)
            del self.changed[old], self.seen[client][old]

    @rule(client=CLIENTS)
    def refresh(self, client):
        assert self.clients[client].refresh().generation == self.generation
        self.seen[client] = dict(self.changed)

    @precondition(lambda self: self.gone)
    @rule(client=CLIENTS)
    def gc(self, client):
        self.clients[client].gc(grace=0)
        self.generation += 1
        for name in self.gone:
            del self.changed[name]
        self.gone.clear()
        self.seen[client] = dict(self.changed)

    @invariant()
    def the_newest_generation_is_the_model(self):
        newest = Repository.open(self.uri)
        found = {n: (newest.read(n, "f"), dict(i.info)) for n, i in newest.items().items()}
        assert found == self.model
        assert newest.removed().keys() == self.gone.keys()
        assert newest.generation == self.generation
        next(self.count)

    @invariant()
    def the_hub_shows_the_experts(self):
        store = self.clients[0].store
        if folder := store.shown_folder:
            shown = {k: store.cat_file(k) for k in store.find("") if not k.startswith(".")}
            experts = {n: content for n, (content, _) in self.model.items() if n.startswith(folder)}
            assert shown == {f"{n.removeprefix(folder)}/f": c for n, c in experts.items()}


def full(*numbers):
    return pytest.param(*numbers, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(
    ("scheme", "runs", "steps"),
    [
        ("virtual", 25, 30),
        ("local", 10, 30),
        ("az", 2, 15),
        ("hf", 2, 15),
        *(full(scheme, 63, 40) for scheme in ("virtual", "local", "az", "hf")),
    ],
)
def test_two_clients_agree_with_a_dict_after_every_step(new_address, scheme, runs, steps):
    count = itertools.count()
    run_state_machine_as_test(
        lambda: TwoClients(new_address(scheme), count),
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert next(count) >= 0.8 * runs * steps  # 2,000 of the full runs; some end early
