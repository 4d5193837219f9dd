"""What an expert is: plain facts about an adapter, and its tensors under their PEFT names.

How experts are kept is in ``library.py``; what a LoRA expert is as mathematics in ``spectral.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mttl_experts.plain import plain
from mttl_experts.tensors import to_safetensors, unread
from mttl_storage import FileEntry, content_digest

FORMAT = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExpertInfo:
    """Facts about one expert, as plain data. Only the name is needed.

    Configs and metrics are copied and made plain on the way in: sets become sorted lists, enums
    their values, so a PEFT config's ``to_dict()`` can be given as it is.

    Attributes:
        expert_name: unique in its library.
        expert_task_name: the task it was trained on, or several.
        parent_node: the expert or cluster it was made from, and ``parents`` where there are more.
        parent_digests: of the weights of each of ``parents``, which names may come to differ from.
        expert_config: PEFT's ``adapter_config.json``.
        training_config: how it was trained.
        expert_model: id of its base model, such as ``"microsoft/phi-2"``.
        model_revision: revision of the base.
        model_architecture: what transformers calls the base's kind, such as ``"llama"``.
        model_fingerprint: digest of the base's weights.
        tokenizer_digest: and ``template_digest``: of the tokenizer and its chat template.
        dataset_digest: of the rows it was trained on.
        recipe_digest: of everything that decides what it is.
        metrics: measured numbers by name.
        licence: such as ``"apache-2.0"``.
        tags: free words.
        created: ISO 8601 time.
        extra: keys that this version does not know, kept as they came.
    """

    expert_name: str
    expert_task_name: str | tuple[str, ...] | None = None
    parent_node: str | None = None
    parents: tuple[str, ...] = ()
    parent_digests: tuple[str, ...] = ()
    expert_config: dict[str, Any] | None = None
    training_config: dict[str, Any] | None = None
    expert_model: str | None = None
    model_revision: str | None = None
    model_architecture: str | None = None
    model_fingerprint: str | None = None
    tokenizer_digest: str | None = None
    template_digest: str | None = None
    dataset_digest: str | None = None
    recipe_digest: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    tags: tuple[str, ...] = ()
    created: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check each field's type and take plain copies."""
        values = vars(self)
        for name, kind in _KINDS.items():
            values[name] = kind(name, values[name])
        _check_extra(self.extra)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks: none, one or several."""
        if self.expert_task_name is None:
            return ()
        if isinstance(self.expert_task_name, str):
            return (self.expert_task_name,)
        return self.expert_task_name

    @property
    def is_merge(self) -> bool:
        """Whether it was merged from other experts."""
        return (self.training_config or {}).get("kind") == "merge"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` turns back into an equal ExpertInfo; no unset fields."""
        data: dict[str, Any] = {"format": FORMAT}
        for name, default in _FIELDS.items():
            value = getattr(self, name)
            if value != default:
                data[name] = plain(value)
        data.update(plain(self.extra))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertInfo:
        """The ExpertInfo that ``to_dict`` gave; keys it does not know go to ``extra``.

        Raises:
            TypeError: naming the field that has a wrong type.
            ValueError: when a newer version of this package wrote it.
        """
        known, extra = _parted(data)
        return cls(**known, extra=extra)


def stored_info(data: Mapping[str, Any]) -> ExpertInfo:
    """``ExpertInfo.from_dict`` for what a log holds: JSON, so that it is plain already.

    Types are checked all the same. A thousand take milliseconds.
    """
    known, extra = _parted(data)
    values = dict(_FIELDS, metrics={}, extra=_copied(extra))
    for name, value in known.items():
        kind = _KINDS[name]
        if type(value) is dict and (kind is _table or kind is _table_or_none):
            values[name] = _copied(value)
        else:
            values[name] = kind(name, value)
    _check_extra(extra)
    info = object.__new__(ExpertInfo)
    vars(info).update(values)
    return info


def _parted(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has a field, and what has none, of what ``to_dict`` gave."""
    if not isinstance(data, Mapping):
        raise TypeError(f"an expert's info is a dict, not {type(data).__name__}: {data!r}")
    version = data.get("format", FORMAT)
    if type(version) is not int or version < 1:
        raise _wrong_type("format", "a whole number from 1", version)
    if version > FORMAT:
        raise ValueError(
            f"expert {data.get('expert_name')!r} has info of format {version}, this version "
            f"reads up to {FORMAT}; upgrade mttl-experts"
        )
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in data.items():
        if name in _FIELDS:
            known[name] = value
        elif name != "format":
            extra[name] = value
    if "expert_name" not in known:
        raise TypeError("ExpertInfo.expert_name is missing; it takes a non-empty string")
    return known, extra


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {k: _copied(v) if type(v) in (dict, list) else v for k, v in value.items()}
    return [_copied(v) if type(v) in (dict, list) else v for v in value]


def _check_extra(extra: Mapping[str, Any]) -> None:
    clash = sorted(extra.keys() & {*_FIELDS, "format"}) if extra else ()
    if clash:
        raise ValueError(f"ExpertInfo.extra holds {clash[0]!r}, which has a place of its own")


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong_type(name, "a non-empty string", value)
    return value


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong_type(name, "a string or None", value)
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
        raise _wrong_type(name, "several strings", value)
    return tuple(value)


def _tasks(name: str, value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, (list, tuple)):
        return _names(name, value)
    if value is not None and not isinstance(value, str):
        raise _wrong_type(name, "a string or several", value)
    return value


def _table(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(name, "a dict of plain data", value)
    return plain(value, f"ExpertInfo.{name}")


def _table_or_none(name: str, value: Any) -> Any:
    return None if value is None else _table(name, value)


def _wrong_type(name: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"ExpertInfo.{name} takes {wanted}, not {type(value).__name__}: {value!r}")


# What checks each field's value and gives the one to keep; the rest are texts.
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    f.name: _text for f in dataclasses.fields(ExpertInfo)
} | {
    "expert_name": _name,
    "expert_task_name": _tasks,
    "parents": _names,
    "parent_digests": _names,
    "expert_config": _table_or_none,
    "training_config": _table_or_none,
    "metrics": _table,
    "tags": _names,
    "extra": _table,
}
# Field name to the value that to_dict leaves out.
_FIELDS: dict[str, Any] = {
    f.name: {} if f.name == "metrics" else f.default
    for f in dataclasses.fields(ExpertInfo)
    if f.name != "extra"
}


@dataclass(frozen=True, eq=False)
class Expert:
    """An adapter: its facts, and its tensors under their PEFT names.

    Without weights it may be stored too: facts first, weights later. Tensors that came from a
    library are read when first used, and are not to be changed in place.

    Attributes:
        expert_info: the facts.
        expert_weights: tensors by name, ``base_model.model.<module>.lora_A.weight`` being (r, i)
            and ``….lora_B.weight`` (o, r); None when there are none yet.
    """

    expert_info: ExpertInfo
    expert_weights: Mapping[str, Tensor] | None = None
    # Set by the library for weights that it keeps. Not an argument, so that a changed copy made by
    # dataclasses.replace never carries the digest of what it was made from.
    _digest: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the types."""
        if not isinstance(self.expert_info, ExpertInfo):
            raise TypeError(
                f"Expert.expert_info takes an ExpertInfo, not {type(self.expert_info).__name__}"
            )
        if self.expert_weights is not None and not isinstance(self.expert_weights, Mapping):
            raise TypeError(
                "Expert.expert_weights takes tensors by name, not "
                f"{type(self.expert_weights).__name__}"
            )

    @property
    def name(self) -> str:
        """Its name."""
        return self.expert_info.expert_name

    @property
    def digest(self) -> str:
        """Digest of its weights and adapter config: equal exactly when those are equal.

        It is the digest of the library item, so it says nothing of name, tags or metrics.
        """
        if self._digest is not None:
            return self._digest
        return content_digest(
            {
                file: FileEntry(len(content), hashlib.sha256(content).hexdigest())
                for file, content in self.files().items()
            }
        )

    def unread(self) -> Expert:
        """The same expert, its weights to be read again where a library keeps them.

        Who goes through many experts one by one, and looks at each so, holds one at a time.
        """
        if self._digest is None or self.expert_weights is None:
            return self
        return stored_expert(self.expert_info, unread(self.expert_weights), self._digest)

    def files(self) -> dict[str, bytes]:
        """The PEFT folder it is kept as: file name to bytes; empty while it has no weights.

        Raises:
            ValueError: when there are weights without a config, or no tensor in them.
        """
        if self.expert_weights is None:
            return {}
        if not self.expert_weights:
            raise ValueError(
                f"expert {self.name!r} has no tensor in its weights, so it would change nothing; "
                "leave expert_weights out to store its facts alone"
            )
        config = self.expert_info.expert_config
        if config is None:
            raise ValueError(
                f"expert {self.name!r} has weights but no ExpertInfo.expert_config, without which "
                "nobody can tell its scaling; give PEFT's adapter config as plain data"
            )
        if self.expert_info.expert_model is not None:
            config = config | {"base_model_name_or_path": self.expert_info.expert_model}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return {CONFIG_FILE: text.encode(), WEIGHTS_FILE: to_safetensors(self.expert_weights)}


def stored_expert(info: ExpertInfo, weights: Mapping[str, Tensor] | None, digest: str) -> Expert:
    """An expert whose digest is known because a library keeps these very bytes."""
    expert = Expert(info, weights)
    object.__setattr__(expert, "_digest", digest)
    return expert
