"""The C sources beside this file as a loaded library, compiled once for this machine.

Nothing is built at install. The first use compiles in about two seconds, into the user's cache,
under the digest of all that the result depends on. Without a compiler there is a reason instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path

SOURCES = ("cpu.c", "blocks.h", "halves.h", "grouped.h", "scores.h")

_COMMON = ("-O3", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno")
# The first set that the compiler takes. OpenMP's functions are torch's own, which are loaded
# already: a second runtime would bring a second pool of threads.
FLAGS = (
    ("-march=native", "-fno-trapping-math", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)


@dataclass(frozen=True)
class Library:
    """The loaded library, or why there is none."""

    functions: ctypes.CDLL | None
    reason: str | None


@cache
def library() -> Library:
    """The compiled kernels; the first call of a process opens them, and builds what is missing."""
    if sys.platform == "win32":
        return Library(None, "compiling kernels on Windows is not supported")
    compiler = _compiler()
    if compiler is None:
        return Library(None, "there is no C compiler (looked for $CC, cc, gcc and clang)")
    try:
        path = _built(compiler, user_cache_path("mttl") / "kernels")
        return Library(ctypes.CDLL(str(path)), None)
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"compiling it failed: {_one_line(error)}")


def _built(compiler: Path, folder: Path) -> Path:
    """Path of the library in ``folder``, compiled if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(compiler)}.so"
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _compile(compiler, path)
    return path


def _compile(compiler: Path, path: Path) -> None:
    """Build beside ``path`` and rename, so that nobody loads half a library."""
    source = Path(__file__).with_name(SOURCES[0])
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unit, made = Path(scratch, "cpu.o"), Path(scratch, "cpu.so")
        for number, flags in enumerate(FLAGS, start=1):
            try:
                _run(compiler, *_COMMON, *flags, "-c", source, "-o", unit)
                break
            except subprocess.CalledProcessError:
                if number == len(FLAGS):
                    raise
        # Linked without -fopenmp, so that it asks for no OpenMP runtime of its own.
        undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        _run(compiler, "-shared", *undefined, unit, "-o", made, "-lm")
        made.replace(path)


def _run(*command: object) -> None:
    subprocess.run(  # noqa: S603
        [str(part) for part in command], check=True, capture_output=True, timeout=120
    )


def _compiler() -> Path | None:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found).resolve()
    return None


def _key(compiler: Path) -> str:
    """Digest of what the library depends on: sources, compiler, flags, processor and torch."""
    here = Path(__file__).parent
    seen = hashlib.sha256()
    for name in SOURCES:
        seen.update(hashlib.sha256((here / name).read_bytes()).digest())
    status = compiler.stat()
    parts = (compiler, status.st_size, status.st_mtime_ns, _COMMON, FLAGS, _processor())
    seen.update(repr((*parts, torch.__version__)).encode())
    return seen.hexdigest()[:32]


def _processor() -> str:
    """What the processor can do; a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        names = ("flags", "Features", "model name")
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))
    return f"{platform.machine()} {platform.processor()}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _one_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["?"]
    return lines[0].strip()
