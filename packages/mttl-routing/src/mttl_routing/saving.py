"""A routed model as a folder, and back.

The folder holds an expert library with the experts and what the router computed from them, the
router's parameters where it has any, and ``routed_model.json``: the order of the experts, the
router's name and options, and which base model it was. The base's weights are not in it.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mttl_experts import Expert, ExpertLibrary, IncompatibleExpertError, IncompatibleExpertWarning
from mttl_routing.attachment import Base

FORMAT = 1
FILE = "routed_model.json"
EXPERTS = "experts"
ROUTER = "router.safetensors"
# Experts that one commit takes; their bytes are in memory until it is made.
TOGETHER = 32


@dataclass(frozen=True)
class Made:
    """How a router was made, so that it can be made again.

    Attributes:
        name: of one of this package's routers; None for an object of the user's own.
        options: what it was built with.
    """

    name: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """What a folder says of a routed model.

    Attributes:
        experts: in the order of the gates' columns.
        library: the library in the folder, which holds them.
        made: how to make the router.
        path: where a router of the user's own is imported from, as ``module:name``.
        state: parameters of the router.
        settings: the routed model's other options.
        disabled: names of the experts that are switched off.
        base: id, revision and fingerprint of the base model.
    """

    experts: list[Expert]
    library: ExpertLibrary
    made: Made
    path: str | None
    state: dict[str, Any]
    settings: dict[str, Any]
    disabled: tuple[str, ...]
    base: dict[str, str | None]


def save(
    folder: Path,
    experts: Sequence[Expert],
    router: Any,
    made: Made,
    settings: Mapping[str, Any],
    disabled: Sequence[str],
    base: Mapping[str, str | None],
    keep: Callable[[ExpertLibrary], object],
) -> None:
    """Write a routed model; the folder is there whole or not at all.

    Args:
        folder: to make; one that holds a routed model already is replaced.
        experts: in the order of the gates' columns.
        router: what chooses.
        made: how it was made.
        settings: the routed model's other options, as plain data.
        disabled: names of the experts that are switched off.
        base: id, revision and fingerprint of the base model.
        keep: told of the new library, to keep in it what the router needs of the experts.

    Raises:
        FileExistsError: something else is there.
    """
    if folder.exists() and not (folder / FILE).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} holds something else; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        new = Path(place, "model")
        new.mkdir()
        library = ExpertLibrary(f"local://{new / EXPERTS}", create=True)
        for start in range(0, len(experts), TOGETHER):
            with library.batch("save a routed model"):
                for expert in experts[start : start + TOGETHER]:
                    library.add_expert(expert.unread())
        keep(library)
        record = {
            "format": FORMAT,
            "base": dict(base),
            "experts": [{"name": e.name, "digest": e.digest} for e in experts],
            "disabled": sorted(disabled),
            "router": _described(router, made),
            **settings,
        }
        if isinstance(router, nn.Module) and (state := router.state_dict()):
            save_file({name: value.contiguous() for name, value in state.items()}, new / ROUTER)
        (new / FILE).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            folder.rename(Path(place, "before"))  # goes with the place, once the new one is there
        new.rename(folder)


def load(folder: Path) -> Saved:
    """What :func:`save` wrote. Nothing that the folder names is imported here.

    Raises:
        FileNotFoundError: no routed model is there.
        ValueError: a newer version of this package wrote it, or an expert is not what it was.
    """
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no routed model: it has no {FILE}")
    record = json.loads((folder / FILE).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{str(folder)!r} holds a routed model of format {record.get('format')!r}, this "
            f"version reads {FORMAT}; upgrade mttl-routing"
        )
    library = ExpertLibrary(f"local://{folder / EXPERTS}", read_only=True)
    experts = []
    for entry in record["experts"]:
        if library.digest(entry["name"]) != entry["digest"]:
            raise ValueError(
                f"expert {entry['name']!r} in {str(folder)!r} is another than the one saved with "
                "this routed model; save it anew"
            )
        experts.append(library.get_expert(entry["name"]))
    state = load_file(folder / ROUTER) if (folder / ROUTER).is_file() else {}
    router = record["router"]
    settings = {name: record[name] for name in ("combine", "granularity")}
    settings["dtype"] = getattr(torch, record["dtype"]) if record["dtype"] else None
    return Saved(
        experts, library, Made(router.get("name"), router.get("options") or {}),
        router.get("import"), state, settings, tuple(record["disabled"]), record["base"],
    )  # fmt: skip


def imported(saved: Saved, folder: Path, trust: bool) -> Any:
    """A router of the user's own, made by the class that the folder names.

    Raises:
        ValueError: the caller did not allow that code to be imported and run.
        ImportError: it is not there.
        TypeError: it needs more than was saved, as a router that was fitted to data does.
    """
    path = str(saved.path)
    if not trust:
        raise ValueError(
            f"the router of {str(folder)!r} is code of its own, {path!r}, which is not imported "
            "unless you allow it: give trust_router=True, or router=... with the object itself"
        )
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the router {path!r} of {str(folder)!r} cannot be imported ({error}); give router=... "
            "with the object itself"
        ) from error
    try:
        return found(**saved.made.options)
    except TypeError as error:
        raise TypeError(
            f"the router {path!r} of {str(folder)!r} cannot be made from what was saved of it "
            f"({error}); give router=... with the object itself"
        ) from error


def parameters_of(saved: Saved, router: Any) -> dict[str, Any]:
    """What was saved of a router's parameters, but for modules that no expert adapts any more."""
    if saved.made.name is None:
        return saved.state
    known = router.state_dict()
    return {name: value for name, value in saved.state.items() if name in known}


def check_base(saved: Saved, base: Base, fingerprint: str) -> None:
    """Refuse another base than the routed model was saved with; warn where its weights differ.

    Raises:
        IncompatibleExpertError: naming both.
    """
    theirs, known = saved.base.get("model_id"), saved.base.get("fingerprint")
    if known in (None, fingerprint):
        return
    if base.model_id is not None and theirs is not None and base.model_id != theirs:
        raise IncompatibleExpertError(
            f"this routed model was saved with base model {theirs!r}, not {base.model_id!r}; load "
            "that base"
        )
    warnings.warn(
        f"this routed model was saved with other weights of the base than these: digest {known!r}, "
        f"here {fingerprint!r}; its results may differ",
        IncompatibleExpertWarning,
        stacklevel=3,
    )


def _described(router: Any, made: Made) -> dict[str, Any]:
    if made.name is not None:
        return {"name": made.name, "options": dict(made.options)}
    kind = type(router)
    options = router.options() if callable(getattr(router, "options", None)) else {}
    return {"import": f"{kind.__module__}:{kind.__qualname__}", "options": options}
