"""Experts by meaning: vectors of what a library knows of each, from a model that the user names.

The model is one that transformers loads. Where sentence-transformers saved it, its pooling and its
prompts are what that says; else a text's vector is the mean of its tokens'. Vectors are kept among
the library's artifacts by digest of the text and of the model, so that only texts that are new, or
that changed, are embedded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mttl_experts.errors import ExpertError
from mttl_experts.expert import ExpertInfo
from mttl_experts.search.text import description
from mttl_storage import Conflict, Corrupt, Denied, NotFound, ReadOnly, StorageFull

if TYPE_CHECKING:
    from mttl_experts.artifacts import Artifacts


# Vectors of texts that are not asked for now and that are kept all the same: a view of a part of a
# library does not forget the rest.
SPARE = 10_000
BATCH = 32
MAX_TOKENS = 512
POOLING_FILE = "1_Pooling/config.json"
PROMPTS_FILE = "config_sentence_transformers.json"


class EmbeddingError(ExpertError):
    """Texts cannot be embedded: the model or what loads it is missing, or will not do."""


class Embedder:
    """Unit vectors of texts, by one model."""

    def __init__(self, model: str) -> None:
        """Load a model.

        Args:
            model: folder or hub id.

        Raises:
            EmbeddingError: it cannot be loaded or pools otherwise than by mean or first token, or
                transformers is not installed.
        """
        self._tokenizer, self._model, settings = _loaded(model)
        self._pooling = _pooling(model, settings.get(POOLING_FILE, {}))
        prompts = settings.get(PROMPTS_FILE, {}).get("prompts", {})
        self._prompts = {kind: prompts.get(kind) or "" for kind in ("query", "document")}
        self.digest = self._digest()
        """Of all that decides the vectors: weights, tokenizer, pooling and prompts."""

    def query(self, text: str) -> Tensor:
        """(d,) float32: what a search for this text looks for."""
        return self._encoded([self._prompts["query"] + text])[0]

    def documents(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32."""
        return self._encoded([self._prompts["document"] + text for text in texts])

    @torch.inference_mode()
    def _encoded(self, texts: Sequence[str]) -> Tensor:
        limit = min(
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", MAX_TOKENS),
            MAX_TOKENS,
        )
        rows = []
        for start in range(0, len(texts), BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            hidden = self._model(**tokens).last_hidden_state.float()  # (b, s, d)
            mask = tokens["attention_mask"][..., None]  # (b, s, 1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            rows.append(hidden[:, 0] if self._pooling == "cls" else mean)
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    def _digest(self) -> str:
        tokenizer = self._tokenizer.backend_tokenizer.to_str()
        facts = [self._model.config.to_json_string(), tokenizer, self._pooling, self._prompts]
        found = hashlib.sha256(repr(facts).encode())
        for name, tensor in self._model.state_dict().items():
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()


class EmbeddingIndex:
    """Vectors of experts' facts, by one model."""

    def __init__(
        self, infos: Mapping[str, ExpertInfo], embedder: Embedder, artifacts: Artifacts
    ) -> None:
        """Embed the facts of experts by name, as far as the artifacts do not hold it."""
        self.names = list(infos)
        self._embedder = embedder
        texts = [description(info) for info in infos.values()]
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        recipe = {"kind": "text embeddings", "version": 1, "model": embedder.digest}
        rows = _kept(artifacts, recipe)
        missing = {k: text for k, text in zip(keys, texts, strict=True) if k not in rows}
        if missing:
            if len(rows) > 2 * len(keys) + SPARE:
                rows = {key: rows[key] for key in keys if key in rows}
            rows |= zip(missing, embedder.documents(list(missing.values())), strict=True)
            with suppress(Conflict, Denied, ReadOnly, StorageFull):  # they are made again then
                artifacts.put([], recipe, _table(rows))
        self._rows = torch.stack([rows[key] for key in keys]) if keys else torch.zeros(0, 1)

    def nearest(self, query: str, limit: int) -> list[tuple[str, float]]:
        """Names whose facts mean most nearly what a query does, and the cosines."""
        if not self.names:
            return []
        cosines = self._rows @ self._embedder.query(query)
        # Stable, so that equal ones stay in the order of their names.
        order = cosines.sort(descending=True, stable=True)
        best = zip(order.indices[:limit].tolist(), order.values[:limit].tolist(), strict=True)
        return [(self.names[row], score) for row, score in best]


def _table(rows: Mapping[bytes, Tensor]) -> dict[str, Tensor]:
    texts = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    return {"texts": texts.view(len(rows), -1), "vectors": torch.stack(list(rows.values()))}


def _kept(artifacts: Artifacts, recipe: Any) -> dict[bytes, Tensor]:
    """Vectors by digest of their text; none where the artifact is missing or damaged."""
    with suppress(Corrupt, NotFound, ValueError):
        kept = artifacts.get([], recipe) or {"texts": torch.zeros(0, 32), "vectors": ()}
        return {bytes(t.tolist()): v for t, v in zip(kept["texts"], kept["vectors"], strict=True)}
    return {}


def _loaded(model: str) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, model, and what sentence-transformers noted beside them, by file."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import cached_file
    except ImportError as error:
        raise EmbeddingError(
            "searching by embeddings needs transformers; install mttl-experts[embeddings]"
        ) from error
    settings: dict[str, Any] = {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
        loaded = AutoModel.from_pretrained(model, use_safetensors=True).eval()
        for file in (POOLING_FILE, PROMPTS_FILE):
            path = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                settings[file] = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise EmbeddingError(
            f"embedding model {model!r} cannot be loaded: {reason}; give the folder or hub id of "
            "an encoder that transformers loads"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, loaded, settings


def _pooling(model: str, noted: Mapping[str, Any]) -> str:
    """``mean`` or ``cls``, in either of the ways in which it has been noted."""
    modes = noted.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, chosen in noted.items()
        if key.startswith("pooling_mode_") and chosen
    ]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if modes not in (["mean"], ["cls"]):
        raise EmbeddingError(
            f"embedding model {model!r} pools its tokens by {', '.join(modes)}; this takes models "
            "that pool by mean or cls"
        )
    return str(modes[0])
