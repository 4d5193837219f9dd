"""Two clients of one repository against a dict, in any order of steps."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mttl_storage import Conflict, NotFound, Repository

NAMES = st.sampled_from(["a", "b", "c", "d/e", "d/f"])
CONTENT = st.binary(max_size=2)
CLIENTS = st.integers(0, 1)
_numbers = itertools.count()


class TwoClients(RuleBasedStateMachine):
    """Each client sees a copy of the model from when it last wrote or refreshed."""

    def __init__(self):
        super().__init__()
        self.uri = f"virtual://model-{next(_numbers)}"
        self.clients = [Repository.open(self.uri, create=True) for _ in range(2)]
        self.model, self.gone = {}, {}
        self.changed = {}  # name -> generation of its last change, if anything is known of it
        self.seen = [{}, {}]  # the same, as each client last saw it
        self.generation = 0

    def teardown(self):
        self.clients[0].store.rm("", recursive=True)

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


TestTwoClients = TwoClients.TestCase
TestTwoClients.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
