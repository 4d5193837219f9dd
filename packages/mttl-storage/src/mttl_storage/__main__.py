"""``python -m mttl_storage ls|cp|verify|gc ADDRESS``: look after a repository from a shell."""

import argparse
import json
import sys

import mttl_storage
from mttl_storage.collecting import GRACE
from mttl_storage.verification import verify


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if all is well, 1 if not."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (mttl_storage.StorageError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mttl_storage", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="ls|cp|verify|gc")

    ls = commands.add_parser("ls", help="List the items: name, files, bytes, digest.")
    ls.add_argument("address")
    ls.add_argument("--prefix", default="", help="Only names that begin with this.")
    ls.add_argument("--json", action="store_true", help="One JSON object a line, info included.")
    ls.set_defaults(run=_ls)

    cp = commands.add_parser("cp", help="Copy items to another repository, made if missing.")
    cp.add_argument("address", help="Where to copy from.")
    cp.add_argument("destination", help="Where to copy to.")
    cp.add_argument("name", nargs="*", help="Items to copy; all by default.")
    cp.set_defaults(run=_cp)

    check = commands.add_parser("verify", help="Read everything, and tell what is damaged.")
    check.add_argument("address")
    check.set_defaults(run=_verify)

    gc = commands.add_parser("gc", help="Delete files that nothing has needed for a while.")
    gc.add_argument("address")
    gc.add_argument(
        "--grace",
        type=float,
        default=GRACE / 3600,
        metavar="HOURS",
        help="How long a file must have been of no use (default: %(default)g).",
    )
    gc.set_defaults(run=_gc)
    return parser


def _ls(options: argparse.Namespace) -> int:
    repository = mttl_storage.Repository.open(options.address, read_only=True)
    for name, item in repository.items(options.prefix).items():
        if options.json:
            files = {file: entry._asdict() for file, entry in item.files.items()}
            row = {**vars(item), "files": files}
            row.pop("home")
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = f"{name}\t{len(item.files)}\t{item.size}\t{item.digest[:12]}\n"
            sys.stdout.write(line)
    return 0


def _cp(options: argparse.Namespace) -> int:
    tick = _progress if sys.stderr.isatty() else None
    names = options.name or None
    copied = mttl_storage.copy(options.address, options.destination, names, tick)
    sys.stdout.write(f"copied {copied} items\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    tick = _progress if sys.stderr.isatty() else None
    problems = verify(mttl_storage.filesystem(options.address), tick)
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{len(problems)} problems\n" if problems else "all well\n")
    return 1 if problems else 0


def _gc(options: argparse.Namespace) -> int:
    repository = mttl_storage.Repository.open(options.address)
    found = repository.gc(options.grace * 3600)
    sys.stdout.write(
        f"deleted {found.files} files, {found.bytes} bytes; "
        f"{found.items} removed items can no longer be restored\n"
    )
    return 0


def _progress(done: int, total: int, name: str) -> None:
    sys.stderr.write(f"\r\x1b[K{done}/{total} {name}" + ("\n" if done == total else ""))


if __name__ == "__main__":
    sys.exit(main())
