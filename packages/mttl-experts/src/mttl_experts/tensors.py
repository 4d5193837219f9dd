"""Named tensors as safetensors: the same bytes for equal tensors, and lazy reading of a file."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes that depend on names, dtypes, shapes and values alone.

    Device, strides, gradients and the order of the mapping leave no trace; tensors that share
    memory are written apart.
    """
    ready: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weight {name!r} is a {type(tensor).__name__}, not a tensor")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes
        if not whole or storage.data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return bytes(safetensors.torch.save(ready, {"format": "pt"}))


def from_safetensors(source: Path | bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of its bytes, by name in sorted order.

    A file is mapped, not read: a tensor's pages come in when they are touched, and a write to a
    tensor never reaches the file.
    """
    try:
        if isinstance(source, bytes):
            loaded = safetensors.torch.load(source)
            return {name: loaded[name] for name in sorted(loaded)}
        with safe_open(source, framework="pt") as file:  # checks the header, and reads no tensor
            names = sorted(file.keys())
            return _mapped(source, names) or {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
        raise ValueError(f"{what} is not a whole safetensors file: {error}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _mapped(path: Path, names: list[str]) -> dict[str, Tensor] | None:
    """Tensors of a file whose header is known to be sound, straight from one private mapping.

    A third of the time that ``get_tensor`` takes for the many small tensors of an adapter. None
    where a tensor is of another kind, empty, or not aligned.
    """
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    (size,) = struct.unpack("<Q", mapping[:8])
    header = json.loads(mapping[8 : 8 + size])
    tensors: dict[str, Tensor] = {}
    for name in names:
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        start, count = 8 + size + entry["data_offsets"][0], math.prod(entry["shape"])
        if dtype is None or not count or start % dtype.itemsize:
            return None
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=start)
        tensors[name] = flat.view(entry["shape"])
    return tensors


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that are fetched when one of them is first asked for."""

    def __init__(self, fetch: Callable[[], dict[str, Tensor]]) -> None:
        """Keep ``fetch``, to be called once, at the first use."""
        self._fetch = fetch
        self._tensors: dict[str, Tensor] | None = None

    def _all(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._fetch()
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(self._all())

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._all())

    def __repr__(self) -> str:
        """Says whether the tensors were fetched; does not fetch them."""
        state = "not read yet" if self._tensors is None else f"{len(self._tensors)} tensors"
        return f"LazyTensors({state})"

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        """Pickled as a plain dict, so that another process needs no open library."""
        return (dict, (dict(self._all()),))

    def unread(self) -> LazyTensors:
        """The same tensors, not fetched yet."""
        return LazyTensors(self._fetch)


def unread(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, to be read again where a library keeps them; others as they are."""
    return tensors.unread() if isinstance(tensors, LazyTensors) else tensors
