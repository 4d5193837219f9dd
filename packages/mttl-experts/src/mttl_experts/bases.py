"""What the experts of a library say of their base models, and whether one more agrees with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mttl_experts.compatible import warn_or_refuse
from mttl_experts.expert import ExpertInfo

# In what experts for one base id should agree, and what it is called.
_FIELDS = {
    "model_architecture": "architecture",
    "model_fingerprint": "weights",
    "tokenizer_digest": "tokenizer",
    "template_digest": "chat template",
}
_Said = tuple[str, str, str]  # base id, field, value


class KnownBases:
    """Architecture and digests of each base id, with the experts that name them."""

    def __init__(self, experts: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Take in experts: name, and what ``ExpertInfo.to_dict`` gives."""
        self._values: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
        self._said: dict[str, list[_Said]] = {}
        for name, facts in experts:
            self.put(name, facts)

    def put(self, name: str, facts: Mapping[str, Any] | None) -> None:
        """Take in an expert in the place of the one of its name; None where there is none now."""
        for said_of, field, value in self._said.pop(name, ()):
            names = self._values[said_of, field][value]
            del names[name]
            if not names:
                del self._values[said_of, field][value]
        base = (facts or {}).get("expert_model")
        if facts is None or not base:
            return
        said = [(base, field, facts[field]) for field in _FIELDS if facts.get(field)]
        for _, field, value in said:
            self._values.setdefault((base, field), {}).setdefault(value, {})[name] = None
        self._said[name] = said

    def check(self, info: ExpertInfo, where: str, *, strict: bool = False) -> None:
        """Warn where others have the base of an expert by name, and none of them has it in fact.

        Args:
            info: facts of the expert, which is not compared with one of its own name.
            where: what holds the others, for the message.
            strict: refuse where there would be a warning.

        Raises:
            IncompatibleExpertError: naming two experts and both digests, if strict.
        """
        for field, what in _FIELDS.items():
            own = getattr(info, field)
            others = {
                value: other
                for value, names in self._values.get((info.expert_model or "", field), {}).items()
                if (other := next((n for n in names if n != info.expert_name), None))
            }
            if own is None or not others or own in others:
                continue
            theirs, other = next(iter(others.items()))
            warn_or_refuse(
                f"expert {info.expert_name!r} was made for base {info.expert_model!r} with {what} "
                f"{own!r}, expert {other!r} of {where} with {theirs!r}; on one base, the results "
                "of one of them may differ",
                strict,
            )
