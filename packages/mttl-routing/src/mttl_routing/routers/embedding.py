"""A prompt as one vector: made by the base model itself, or by an encoder of the user's own.

Routers that compare prompts with what experts were trained on start here. Nothing here knows a data
set: examples come in as texts, or as batches of token ids.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from mttl_routing.attachment import base_of
from mttl_routing.observing import inputs_of
from mttl_routing.routers.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel

Batch = Mapping[str, Tensor]
Example = str | Batch
Encoder = Callable[[Sequence[str]], Tensor]
# How encoders call the norm that their last hidden states go through.
_NORMS = ("final_layer_norm", "layer_norm")


class Embedding(Protocol):
    """Prompts as vectors."""

    @property
    def recipe(self) -> Any:
        """Plain data that decides the vectors, or None where that is not known."""
        ...

    def of(self, prompt: Prompt) -> Tensor:
        """(b, d) float32, each row for itself, padding left out."""
        ...

    def of_examples(self, examples: Iterable[Example]) -> Tensor:
        """(n, d) float32, of texts or of the rows of batches."""
        ...


class BaseEmbedding:
    """Means over a prompt's tokens of what the base model makes of them; no other model is needed.

    Args:
        base_model: from :func:`mttl_adapters.load_base_model`, or a bare transformers model, which
            does for batches but not for texts.
        of: ``hidden`` is the last hidden states, one forward of the base; ``input`` is the input
            embeddings, which costs no forward.
        batch_size: texts embedded at once; the vectors do not depend on it.
    """

    def __init__(
        self,
        base_model: BaseModel | PreTrainedModel,
        of: str = "hidden",
        *,
        batch_size: int = 16,
    ) -> None:
        """Find where the base's last hidden states can be seen."""
        if of not in ("hidden", "input"):
            raise ValueError(f"a prompt's embedding is of {of!r}; it takes 'hidden' or 'input'")
        base = base_of(base_model)
        self.kind = of
        self.batch_size = batch_size
        self._model = base.model
        self._tokenizer = getattr(base_model, "tokenizer", None)
        self._last = _reads_last_hidden_states(base.model) if of == "hidden" else None
        self.recipe: Any = None
        if base.fingerprint is not None:
            self.recipe = {
                "kind": f"mean-{of}",
                "format": 1,
                "base": base.fingerprint,
                "tokenizer": base.tokenizer_digest,
            }

    @torch.no_grad()  # all of it: set up for checkpointing, a base has embeddings with gradients
    def of(self, prompt: Prompt) -> Tensor:
        """(b, d) float32 mean over the tokens that count."""
        if self._last is None:
            states = self._model.get_input_embeddings()(prompt.input_ids)
        else:
            states = prompt.activations([self._last])[self._last]
        mask = prompt.attention_mask.to(states.device, torch.float32).unsqueeze(-1)  # (b, s, 1)
        # Where, not a product: padding may hold NaN in some attention kernels.
        kept = states.float().where(mask > 0, 0.0)
        mean: Tensor = kept.sum(1) / mask.sum(1).clamp_min(1)
        return mean

    def of_examples(self, examples: Iterable[Example]) -> Tensor:
        """(n, d) float32, of texts or of the rows of batches."""
        vectors = [self.of(prompt) for prompt in self._prompts(examples)]
        if not vectors:
            raise ValueError("no examples were given; give texts, or batches of token ids")
        return torch.cat(vectors)

    def _prompts(self, examples: Iterable[Example]) -> Iterator[Prompt]:
        for chunk in _chunks(examples, self.batch_size):
            batch = chunk if isinstance(chunk, Mapping) else self._tokenized(chunk)
            prompt = prompt_of(batch, self._model.device)
            yield replace(prompt, observe=partial(self._observe, prompt))

    def _tokenized(self, texts: Sequence[str]) -> Batch:
        if self._tokenizer is None:
            raise ValueError(
                "texts need the base's tokenizer to be embedded, and a bare transformers model "
                "brings none; give one from load_base_model, or batches of token ids"
            )
        rows = [torch.tensor(ids) for ids in self._tokenizer(list(texts))["input_ids"]]
        # On the right, so that absolute positions count from 0 in every row.
        return {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            ),
        }

    def _observe(self, prompt: Prompt, paths: Sequence[str]) -> Mapping[str, Tensor]:
        model = self._model
        entry = model.get_encoder() if model.config.is_encoder_decoder else model
        mask = prompt.attention_mask
        inputs = {"input_ids": prompt.input_ids, "attention_mask": mask}
        if "position_ids" in inspect.signature(entry.forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs_of(model, paths, entry, **inputs)


class TextEmbedding:
    """Vectors of prompts' texts by an encoder of the user's own.

    Args:
        encoder: from texts to (n, d); it adds its own instruction, where it wants one.
        name: what it is called in what is kept; None keeps nothing, since an encoder that changed
            could not be told from the one before.
        tokenizer: to read batches of token ids as texts; texts need none.
    """

    def __init__(self, encoder: Encoder, name: str | None = None, *, tokenizer: Any = None) -> None:
        """Keep the encoder; it is called when the first prompt comes."""
        self.encoder = encoder
        self._tokenizer = tokenizer
        self.recipe: Any = None if name is None else {"kind": "encoder", "format": 1, "name": name}

    def of(self, prompt: Prompt) -> Tensor:
        """(b, d) float32, on the prompt's device."""
        return self._of_texts(prompt.texts()).to(prompt.input_ids.device)

    def of_examples(self, examples: Iterable[Example]) -> Tensor:
        """(n, d) float32, of texts or of the rows of batches."""
        return self._of_texts(texts_of(examples, self._tokenizer))

    def _of_texts(self, texts: Sequence[str]) -> Tensor:
        vectors = torch.as_tensor(self.encoder(texts)).detach().float()
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise ValueError(
                f"the encoder made {tuple(vectors.shape)} of {len(texts)} texts; it must give one "
                "vector for each, (n, d)"
            )
        return vectors


def embedding_of(
    embedding: str | Embedding | Encoder, base_model: BaseModel | PreTrainedModel | None
) -> Embedding:
    """An embedding by name (``hidden`` or ``input``), of an encoder, or as it is."""
    if isinstance(embedding, str):
        if base_model is None:
            raise ValueError(
                f"embedding prompts by {embedding!r} takes the base model; give base_model=..., or "
                "an encoder of your own"
            )
        return BaseEmbedding(base_model, embedding)
    if hasattr(embedding, "of_examples"):
        return cast("Embedding", embedding)
    if not callable(embedding):
        raise TypeError(
            f"{embedding!r} embeds no prompts; it takes 'hidden', 'input', an object with `of` and "
            "`of_examples`, or a callable from texts to (n, d)"
        )
    return TextEmbedding(embedding, tokenizer=getattr(base_model, "tokenizer", None))


def prompt_of(batch: Batch, device: torch.device | None = None, tokenizer: Any = None) -> Prompt:
    """The rows of a batch of token ids; without ``attention_mask`` every token counts."""
    ids = batch["input_ids"].to(device)
    mask = batch.get("attention_mask")
    return Prompt(
        ids, torch.ones_like(ids) if mask is None else mask.to(device), tokenizer=tokenizer
    )


def texts_of(examples: Iterable[Example], tokenizer: Any = None) -> list[str]:
    """Texts as they are, and rows of batches decoded."""
    texts: list[str] = []
    for example in examples:
        if isinstance(example, str):
            texts.append(example)
        else:
            texts += prompt_of(example, tokenizer=tokenizer).texts()
    return texts


def taken(
    examples: Mapping[str, Iterable[Example]], most: int | None = None
) -> dict[str, list[Example]]:
    """The first ``most`` examples of each name, in the order of the names.

    Raises:
        ValueError: naming those that have none.
    """
    chosen = {name: list(islice(iter(examples[name]), most)) for name in sorted(examples)}
    empty = [name for name, some in chosen.items() if not some]
    if empty or not chosen:
        whose = f"of {empty!r}" if empty else "at all"
        raise ValueError(f"no examples {whose} were given to fit a router on; give some texts each")
    return chosen


def examples_digest(examples: Sequence[Example]) -> str:
    """64 hexadecimal digits for the content of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        if isinstance(example, str):
            part = b"text " + example.encode()
        else:
            prompt = prompt_of(example)
            part = (
                b"ids " + repr((prompt.input_ids.tolist(), prompt.attention_mask.tolist())).encode()
            )
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[str] | Batch]:
    """Texts that follow one another, ``size`` at a time, and batches as they are."""
    texts: list[str] = []
    for example in examples:
        if isinstance(example, str):
            texts.append(example)
        if texts and (len(texts) == size or not isinstance(example, str)):
            yield texts
            texts = []
        if not isinstance(example, str):
            yield example
    if texts:
        yield texts


def _reads_last_hidden_states(model: Any) -> str:
    """Path of a module whose input is the last hidden states of the part that reads the prompt."""
    if model.config.is_encoder_decoder:  # before the encoder's last norm
        inside = {
            id(module) for name, module in model.get_encoder().named_children() if name in _NORMS
        }
    else:
        inside = {id(model.get_output_embeddings())}
    found: list[str] = [path for path, module in model.named_modules() if id(module) in inside]
    if not found:
        raise ValueError(
            f"where a {type(model).__name__} has its last hidden states is not known; embed "
            "prompts by 'input', or by an encoder of your own"
        )
    return found[0]
