"""A click command whose options can also be given by key: ``-c a.json+b.json -k key=value …``.

Config files are read from left to right, then the pairs of ``-k``; a flag on the command line wins
over both. An option's key is its name, or an older name for it. A key that this app does not have
and another does is left to that app, in words; a key that nobody knows is an error.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from mttl_experts.jobs.progress import say

INTERRUPTED = 130


class JobCommand(click.Command):
    """A command with ``-c`` and ``-k`` for all of its options.

    Args:
        aliases: older name of a key -> name of the option that it sets.
        others: keys of the other apps that may share a config file with this one.
    """

    def __init__(
        self,
        *args: Any,
        aliases: Mapping[str, str] | None = None,
        others: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        """Add the two options to those declared."""
        super().__init__(*args, **kwargs)
        self.aliases = dict(aliases or {})
        self.others = frozenset(others)
        self.params += [
            click.Option(
                ["-c", "configs"],
                metavar="A.json+B.json",
                help="Config files, the later ones winning; looked up as given, then in "
                "$CONFIG_PATH and in configs/.",
            ),
            click.Option(
                ["-k", "pairs"],
                metavar="KEY=VALUE ...",
                multiple=True,
                help="Options by name: any of the above, or one of "
                + ", ".join(sorted(self.aliases))
                + ".",
            ),
        ]

    def keys(self) -> dict[str, str]:
        """Name of the option that each key sets: its own name, its flags' and older ones."""
        options = [p for p in self.params if isinstance(p, click.Option) and p.name not in _OWN]
        flags = {flag: str(p.name) for p in options for flag in p.opts if flag.startswith("--")}
        names = {flag.removeprefix("--").replace("-", "_"): name for flag, name in flags.items()}
        return {str(p.name): str(p.name) for p in options} | names | self.aliases

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the files and pairs into the context's defaults, then the flags as usual."""
        args = list(_one_pair_each(args))
        configs = [value for flag, value in _values(args) if flag == "-c"]
        pairs = [value for flag, value in _values(args) if flag == "-k"]
        given: list[tuple[str, str, Any]] = []  # where, key, value
        for file in "+".join(configs).split("+") if configs else []:
            path = find_config(file)
            given += [(str(path), key, value) for key, value in read_config(path).items()]
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if not equals:
                raise click.UsageError(f"-k takes KEY=VALUE, got {pair!r}")
            given.append(("-k", key, literal(text)))
        keys = self.keys()
        elsewhere = [key for _, key, _ in given if key in self.others and key not in keys]
        if elsewhere:
            click.echo(f"keys of another app, without effect here: {', '.join(elsewhere)}")
        defaults = dict(ctx.default_map or {}) | {
            _known(key, keys, where): value for where, key, value in given if key not in elsewhere
        }
        options = {p.name: p for p in self.params if isinstance(p, click.Option)}
        ctx.default_map = {
            name: _plain_value(options[name], value)
            for name, value in defaults.items()
            if value is not None
        }
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it without the two options, whose work is done."""
        for name in _OWN:
            ctx.params.pop(name, None)
        return super().invoke(ctx)


_OWN = ("configs", "pairs")


def find_config(name: str) -> Path:
    """Path of a config file: as given, in ``$CONFIG_PATH``, in ``configs/``; with or without .json.

    Raises:
        click.UsageError: there is none, naming the places looked at.
    """
    folders = [Path(), *(Path(p) for p in [os.environ.get("CONFIG_PATH")] if p), Path("configs")]
    for folder in folders:
        for ending in ("", ".json"):
            path = folder / f"{name}{ending}"
            if path.is_file():
                return path
    places = ", ".join(repr(str(folder)) for folder in folders)
    raise click.UsageError(f"no config file {name!r} or {name + '.json'!r} in {places}")


def read_config(path: Path) -> dict[str, Any]:
    """Keys and values of one config file.

    Raises:
        click.UsageError: it is not JSON, or not an object, naming file, line and column.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise click.UsageError(
            f"config {str(path)!r} is not JSON: {error.msg} at {where}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"config {str(path)!r} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise click.UsageError(
            f"config {str(path)!r} holds a {type(config).__name__}; it must be an object of keys"
        )
    return config


def literal(text: str) -> Any:
    """Value of ``text``: a Python or JSON literal, a ``$VARIABLE``, else the text itself.

    Raises:
        click.UsageError: the variable is not set.
    """
    if text.startswith("$"):
        if text[1:] not in os.environ:
            raise click.UsageError(f"the environment has no variable {text[1:]!r}")
        return os.environ[text[1:]]
    for word, value in (("true", True), ("false", False), ("null", None)):
        if text == word:
            return value
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


@contextmanager
def known_errors(*kinds: type[Exception]) -> Iterator[None]:
    """One clear line for what users can cause, and for Ctrl-C; bugs keep their traceback.

    Each package has one class from which its errors of that sort derive. Those of storage and
    experts are known here, and so is the system's ``OSError``: a full disk, a folder that cannot be
    written. A bare ``ValueError`` is a bug in every app. The packages' warnings are lines too.

    Args:
        kinds: the classes of the other packages in use, such as ``mttl_data.DataError``.
    """
    from mttl_experts.errors import ExpertError
    from mttl_storage import StorageError

    known: tuple[type[Exception], ...] = (ExpertError, StorageError, OSError, *kinds)
    try:
        with _warnings_as_lines():
            yield
    except KeyboardInterrupt:
        click.echo("\nStopped. Run the same command again to go on from where it was.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except known as error:
        # A KeyError shows its message in quotes.
        text = error.args[0] if isinstance(error, LookupError) and error.args else error
        raise click.ClickException(" ".join(str(text).split())) from error


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What our packages warn of, each text once; other warnings go where they went."""
    told: set[str] = set()
    with warnings.catch_warnings():
        elsewhere = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            text = " ".join(str(message).split())
            if not category.__module__.startswith("mttl_"):
                elsewhere(message, category, *where, **options)
            elif text not in told:
                told.add(text)
                say(f"warning: {text}")

        warnings.showwarning = show
        yield


def _one_pair_each(args: Sequence[str]) -> Iterator[str]:
    """``-k a=1 b=2`` as ``-k a=1 -k b=2``, which is what click understands."""
    in_pairs = False
    split = [part for arg in args for part in _flag_and_value(arg)]
    for arg in split:
        if arg == "-k":
            in_pairs = True
            continue
        if arg.startswith("-") and in_pairs:
            in_pairs = False
        if in_pairs:
            yield "-k"
        yield arg


def _flag_and_value(arg: str) -> list[str]:
    """``-kx=1`` and ``-cfile`` as click would take them: a flag and its value."""
    return [arg[:2], arg[2:]] if arg[:2] in ("-k", "-c") and len(arg) > 2 else [arg]


def _values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each ``-c`` and ``-k`` with what follows it."""
    for flag, value in pairwise(args):
        if flag in ("-c", "-k"):
            yield flag, value


def _plain_value(option: click.Option, value: Any) -> Any:
    """A value as the flag would bring it: a list is repeated flags, or their comma list.

    Raises:
        click.UsageError: it holds more than plain values.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for part in values:
        if not isinstance(part, (str, int, float)):
            raise click.UsageError(
                f"{option.opts[0]} is given as {value!r}; it takes one value, or a list of them"
            )
    if option.multiple:
        return values
    return ",".join(map(str, values)) if isinstance(value, (list, tuple)) else value


def _known(key: str, keys: Mapping[str, str], where: str) -> str:
    if key in keys:
        return keys[key]
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(keys)}"
    raise click.UsageError(f"unknown key {key!r} in {where}; {hint}")
