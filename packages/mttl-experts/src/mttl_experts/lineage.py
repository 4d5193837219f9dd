"""Where an expert came from and what was made of it, told from the library's log alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mttl_experts.expert import ExpertInfo
from mttl_experts.plain import recipe_digest
from mttl_experts.selection import EXPERTS

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter

Kind = Literal["data", "base", "expert", "merge", "model"]


class Node(NamedTuple):
    """One thing in a lineage.

    Attributes:
        kind: data, base, expert, merge, or model (what was scored as one).
        name: as it is called now, or was.
        digest: of its content, where it is known.
        state: of an expert: here, removed, replaced (its name has other weights now), or unknown.
    """

    kind: Kind
    name: str
    digest: str | None = None
    state: str = ""

    def __str__(self) -> str:
        """One line for people."""
        digest = f" {self.digest[:12]}" if self.digest else ""
        note = f" ({self.state})" if self.state not in ("", "here") else ""
        return f"{self.kind} {self.name}{digest}{note}"


class Edge(NamedTuple):
    """That ``target`` was made of ``source``."""

    source: Node
    target: Node
    how: str


@dataclass(frozen=True)
class Lineage:
    """The graph data -> expert -> merge -> model around one expert.

    Attributes:
        node: the expert itself.
        edges: each from what was used to what was made, in the order in which they were found.
    """

    node: Node
    edges: tuple[Edge, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that is in it, the expert first."""
        ends = (end for edge in self.edges for end in (edge.source, edge.target))
        return tuple(dict.fromkeys([self.node, *ends]))

    def made_of(self, node: Node) -> list[Edge]:
        """What one of its nodes was made of."""
        return [edge for edge in self.edges if edge.target == node]

    def made_from(self, node: Node) -> list[Edge]:
        """What was made of one of its nodes."""
        return [edge for edge in self.edges if edge.source == node]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: nodes, and edges as pairs of their numbers."""
        nodes = self.nodes
        number = {node: index for index, node in enumerate(nodes)}
        return {
            "nodes": [node._asdict() for node in nodes],
            "edges": [[number[e.source], number[e.target], e.how] for e in self.edges],
        }


@dataclass(frozen=True)
class Recipe:
    """What decides what an expert is.

    Attributes:
        digest: of all of it: the expert's own ``recipe_digest``, or that of the other fields here.
        config: digest of its adapter config and training settings.
        data: digest of what it was trained on, by task where that is known.
        base: fingerprint of the base, or its id where there is none.
        parents: digests, or names where there are none.
        tools: versions of what made it.
    """

    digest: str
    config: str | None
    data: Any = None
    base: str | None = None
    parents: tuple[str, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)


def recipe_of(info: ExpertInfo) -> Recipe:
    """The recipe that an expert's facts record."""
    training = info.training_config or {}
    settings = {key: value for key, value in training.items() if key not in ("versions", "report")}
    config = recipe_digest([info.expert_config, settings]) if info.expert_config else None
    found: dict[str, Any] = {
        "config": config,
        "data": training.get("data") or info.dataset_digest,
        "base": info.model_fingerprint or info.expert_model,
        "parents": info.parent_digests or _parent_names(info),
        "tools": dict(training.get("versions") or {}),
    }
    return Recipe(info.recipe_digest or recipe_digest(found), **found)


def lineage(library: LibraryWriter, name: str) -> Lineage:
    """What an expert was made of, and what was made of it; see ``ExpertLibrary.lineage``."""
    known = Known(library)
    start = known.node(library.digest(name), name)
    edges = list(dict.fromkeys([*known.upwards(start, set()), *known.downwards(start, set())]))
    return Lineage(start, tuple(edges))


class Known:
    """Experts by digest and by name: those here, those removed, and those of older generations."""

    def __init__(self, library: LibraryWriter) -> None:
        """Read what the library's generation has; older ones only when they are asked for."""
        self._library = library
        repository = library.repository
        self._live = {
            name.removeprefix(EXPERTS): item for name, item in repository.items(EXPERTS).items()
        }
        removed = {
            name.removeprefix(EXPERTS): item for name, item in repository.removed(EXPERTS).items()
        }
        self._removed = {item.digest: name for name, item in removed.items()}
        self._names: dict[str, list[str]] = {}
        for name, item in self._live.items():
            self._names.setdefault(item.digest, []).append(name)
        self._infos = {name: library.stored_info(name, item) for name, item in self._live.items()}
        self._gone = {name: library.stored_info(name, item) for name, item in removed.items()}

    def node(self, digest: str | None, name: str | None = None) -> Node:
        """The expert of a digest (or of a name, where no digest is known) as it stands now."""
        if digest is None:
            here = name in self._live
            digest = self._live[name].digest if here and name is not None else None
        names = self._names.get(digest or "", [])
        if names:
            name = name if name in names else names[0]
            return Node(self._kind(self._infos[name]), name, digest, "here")
        if digest in self._removed:
            name = self._removed[digest]
            return Node(self._kind(self._gone[name]), name, digest, "removed")
        past = self._past.get(digest or "", name or "")
        state = "replaced" if past and past in self._live else "unknown"
        return Node("expert", past or "unnamed", digest, state)

    @cached_property
    def _past(self) -> dict[str, str]:
        """The names that weights had in all generations, by digest."""
        return {
            change.digest: change.name.removeprefix(EXPERTS)
            for commit in self._library.repository.history()
            for change in commit.changes
            if change.digest and change.name.startswith(EXPERTS)
        }

    def upwards(self, node: Node, seen: set[Node]) -> Iterator[Edge]:
        """What a node was made of, what that was made of, and so on."""
        info = self._info(node)
        if info is None or node in seen:
            return
        seen.add(node)
        for data in _data(info):
            yield Edge(data, node, "trained on")
        if info.expert_model is not None:
            yield Edge(Node("base", info.expert_model, info.model_fingerprint), node, "base")
        how = str((info.training_config or {}).get("method") or "parent")
        digests = info.parent_digests or (None,) * len(_parent_names(info))
        for digest, name in zip(digests, _parent_names(info), strict=False):
            parent = self.node(digest, name)
            yield Edge(parent, node, how)
            yield from self.upwards(parent, seen)

    def downwards(self, node: Node, seen: set[Node]) -> Iterator[Edge]:
        """What was made of a node, what was made of that, and so on."""
        if node in seen:
            return
        seen.add(node)
        for name, info in self._infos.items():
            by_digest = node.digest is not None and node.digest in info.parent_digests
            by_name = not info.parent_digests and node.name in _parent_names(info)
            if by_digest or by_name:
                child = self.node(self._live[name].digest, name)
                yield Edge(node, child, str((info.training_config or {}).get("method") or "parent"))
                yield from self.downwards(child, seen)
        for experts, method in self._models:
            if node.digest in experts:
                digest = recipe_digest([list(experts), method])
                words = " ".join(f"{key} {value}" for key, value in method.items() if value)
                count = f"{len(experts)} expert{'s' * (len(experts) > 1)}"
                yield Edge(node, Node("model", f"{words} of {count}", digest), "scored as")

    @cached_property
    def _models(self) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
        """What was scored as one model: digests of its experts, and how they were put together."""
        found = {}
        for score in self._library.scores.table():
            method = score.recipe.get("method")
            if isinstance(method, Mapping) and method:
                key = recipe_digest([list(score.experts), dict(method)])
                found[key] = (score.experts, dict(method))
        return list(found.values())

    def _info(self, node: Node) -> ExpertInfo | None:
        if node.state == "here":
            return self._infos[node.name]
        return self._gone[node.name] if node.state == "removed" else None

    def _kind(self, info: ExpertInfo) -> Kind:
        return "merge" if info.is_merge else "expert"


def _parent_names(info: ExpertInfo) -> tuple[str, ...]:
    alone = (info.parent_node,) if info.parent_node is not None else ()
    return info.parents or alone


def _data(info: ExpertInfo) -> list[Node]:
    data = (info.training_config or {}).get("data")
    if isinstance(data, Mapping):
        return [Node("data", str(task), str(digest)) for task, digest in sorted(data.items())]
    if info.parent_digests or info.parents:
        return []  # made of experts; their tasks are not its data
    return [Node("data", task, info.dataset_digest) for task in info.tasks]
