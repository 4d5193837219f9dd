"""Base models: loading one by name and knowing it again by its fingerprint.

A name is ``embedded``, a folder that transformers can load, or a hub id. What an adapter is trained
on is identified by :class:`BaseModel`: its id, revision, and digests of its weights, tokenizer and
chat template. Quantised or not, the model is used through its layers' inputs and outputs alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mttl_adapters.embedded import (
    EMBEDDED_ID,
    EMBEDDED_PACKAGE,
    embedded_folder,
    embedded_gguf,
)
from mttl_adapters.errors import BaseModelError
from mttl_adapters.progress import Progress, download_bar
from mttl_adapters.quiet import quiet_transformers

_HUB_PATIENCE_S = 10.0  # for the hub's first answer; loading would retry for much longer
# Number formats by their older names.
_DTYPES = {"bf16": "bfloat16", "16": "float16", "32": "float32"}
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class BaseModel:
    """A causal language model, its tokenizer, and what identifies both."""

    model: Any
    tokenizer: Any
    model_id: str
    revision: str | None
    fingerprint: str
    tokenizer_digest: str
    template_digest: str | None


def load_base_model(
    name: str = "embedded",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BaseModel:
    """The causal language model called ``name``, in eval mode, frozen, with its tokenizer.

    Args:
        name: ``embedded``, a folder, or a hub id; the embedded model's own hub id means it too.
        revision: branch, tag or commit on the hub.
        dtype: torch's name or one of ``bf16``, ``16`` and ``32``; ``auto`` is bfloat16 where the
            device multiplies it natively, else float32.
        device: ``auto`` is the first accelerator, else the CPU.
        cache: where the embedded model is kept once converted.
        progress: told of the download from the hub, or of the embedded model's conversion.

    Raises:
        BaseModelError: there is no such folder, it holds no weights, or the hub does not answer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    elif isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    model_id = _model_id(name)
    source = model_id
    if model_id == EMBEDDED_ID and revision is None and find_spec(EMBEDDED_PACKAGE):
        source = str(embedded_folder(cache, progress))
    _check_source(source, revision)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=dtype, tqdm_class=download_bar(progress)
            )
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(_cannot_load(name, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval().to(device)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        model_id=model_id,
        revision=None if Path(source).is_dir() else _commit(source, revision),
        fingerprint=fingerprint(model),
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=_digest(tokenizer.chat_template) if tokenizer.chat_template else None,
    )


def _model_id(name: str) -> str:
    """What to call the base: a folder by its one real path, however it was typed."""
    if name == "embedded":
        embedded_gguf()  # its error says what to install
        return EMBEDDED_ID
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Whether ``device`` has bfloat16 matrix instructions, so that bfloat16 is faster there."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return False


def fingerprint(model: nn.Module, samples: int = 64) -> str:
    """Digest of a model's parameter names, shapes and fixed samples of their values.

    Two loads of the same checkpoint agree whether in float32 or bfloat16, since the samples are
    rounded to bfloat16 first; other weights, a quantised copy among them, differ.

    Args:
        model: a base model without adapters.
        samples: values read from each parameter, spread evenly over it.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        count = min(samples, flat.numel())
        # Integer arithmetic, so that the places are the same on every machine.
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        values = flat[places].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a tokenizer makes of text: its whole backend where it has one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of the last call, not of the tokenizer.
        backend = type(backend).from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        return _digest(backend.to_str())
    return _digest(repr(sorted(tokenizer.get_vocab().items())))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_source(source: str, revision: str | None) -> None:
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise BaseModelError(
                f"no model folder {source!r}; name an existing folder, a hub id, or 'embedded'"
            )
        _check_hub(source, revision)
        return
    if not (path / "config.json").exists():
        raise BaseModelError(f"model folder {source!r} has no config.json; is it the right folder?")
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise BaseModelError(
            f"model folder {source!r} has a config.json but no weights "
            f"({' or '.join(_WEIGHT_FILES)}); save the model there with save_pretrained"
        )


def _check_hub(model_id: str, revision: str | None) -> None:
    """Ask the hub once, unless the model is in its cache on this machine."""
    import huggingface_hub
    from huggingface_hub import errors

    # The base error of whichever httpx the client has.
    transport: type[Exception] = vars(errors)["HTTPError"]
    try:
        cached = huggingface_hub.try_to_load_from_cache(model_id, "config.json", revision=revision)
        if not isinstance(cached, str):
            huggingface_hub.HfApi().model_info(model_id, revision=revision, timeout=_HUB_PATIENCE_S)
    except (OSError, ValueError, transport) as error:
        raise BaseModelError(_cannot_load(model_id, error)) from error


def _commit(model_id: str, revision: str | None) -> str | None:
    """The commit of the hub that a loaded model came from, by its place in the cache."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def _cannot_load(name: str, error: BaseException) -> str:
    if Path(name).expanduser().is_dir():
        return f"cannot load the model in {name!r}: {_first_line(error)}"
    return (
        f"could not get model {name!r} from the Hugging Face Hub ({_first_line(error)}); "
        f"pass a local folder that holds it, or 'embedded' for the model that comes with mttl"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
