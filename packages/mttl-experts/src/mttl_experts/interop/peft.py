"""PEFT adapters in a folder: config and weights as they are, whatever the tuner."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE, Expert, ExpertInfo
from mttl_experts.interop.folder import Folder
from mttl_experts.interop.found import Found, FoundExpert, provenance
from mttl_experts.legacy import read_archive
from mttl_experts.tensors import from_safetensors
from mttl_storage import Corrupt

OLD_WEIGHTS_FILE = "adapter_model.bin"
_SMALL = 16 << 20  # bytes of a config or a card, at most
_LARGE = 64 << 30
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
_LICENCE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
_CARD = "README.md"


def peft_experts(folder: Folder, excluded: Collection[str] = ()) -> Found:
    """The PEFT adapters of a folder: the one at its root, and those in folders below it."""
    found = Found(folder)
    places = sorted(path.removesuffix(CONFIG_FILE) for path in folder.sizes if _is_config(path))
    taken: set[str] = set()
    for place in places:
        last = place.rstrip("/").rpartition("/")[2]
        if _CHECKPOINT.fullmatch(last) and place.removesuffix(f"{last}/") in places:
            found.left_out.append(
                f"{place.rstrip('/')}: a checkpoint of the training of the adapter beside it; name "
                "it as a source of its own to import it"
            )
            taken |= {path for path in folder.sizes if path.startswith(place)}
            continue
        name = place.rstrip("/").replace("/", "-") or folder.name
        if name in excluded:
            found.excluded.append(name)
            taken |= {path for path in folder.sizes if path.startswith(place)}
            continue
        weights = next(
            (f for f in (WEIGHTS_FILE, OLD_WEIGHTS_FILE) if place + f in folder.sizes), None
        )
        config = place + CONFIG_FILE
        taken.add(config)
        if weights is None:
            raise Corrupt(
                f"{config!r} in {folder.address} has no {WEIGHTS_FILE!r} beside it; name only "
                "folders that are whole"
            )
        taken |= {place + weights, place + _CARD} & folder.sizes.keys()
        found.experts.append(_expert(folder, name, place, config, place + weights))
    others = sorted(folder.sizes.keys() - taken)
    if others:
        shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        found.left_out.append(f"{len(others)} files that are no part of an adapter: {shown}")
    return found


def _is_config(path: str) -> bool:
    return path == CONFIG_FILE or path.endswith(f"/{CONFIG_FILE}")


def _expert(
    folder: Folder, name: str, place: str, config_path: str, weights_path: str
) -> FoundExpert:
    config = _config(folder, config_path)

    def read() -> Expert:
        card = place + _CARD
        licence = None
        if card in folder.sizes:
            text = folder.read(card, _SMALL).decode("utf-8", "replace")
            if text.startswith("---") and (match := _LICENCE.search(text.split("\n---", 1)[0])):
                licence = match[1]
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        info = ExpertInfo(
            expert_name=name,
            expert_config=config,
            expert_model=base if isinstance(base, str) and base else None,
            model_revision=revision if isinstance(revision, str) and revision else None,
            licence=licence,
            extra=dict(provenance(folder, "peft")),
        )
        return Expert(info, _weights(folder, weights_path))

    kind = str(config["peft_type"]).lower()
    size = folder.sizes[config_path] + folder.sizes[weights_path]
    return FoundExpert(name, f"PEFT {kind}", folder.address, size, read)


def _config(folder: Folder, path: str) -> dict[str, Any]:
    where = f"{path!r} in {folder.address}"
    try:
        config = json.loads(folder.read(path, _SMALL))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise Corrupt(f"{where} is no adapter config: it names no peft_type")
    return config


def _weights(folder: Folder, path: str) -> dict[str, Tensor]:
    content = folder.read(path, _LARGE)
    where = f"{path} in {folder.address}"
    if path.endswith(WEIGHTS_FILE):
        try:
            return from_safetensors(content)
        except ValueError as error:
            raise Corrupt(f"{where}: {error}") from None
    tensors = read_archive(content, where)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise Corrupt(f"{where} does not hold tensors by name alone")
    return tensors
