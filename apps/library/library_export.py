"""The command ``export``: experts out of a library, in the formats of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mttl_experts.jobs import bar, known_errors, say, weights_of

if TYPE_CHECKING:
    from mttl_experts import Expert, ExpertLibrary

FORMATS = ("peft", "dense", "gguf", "stacked")


@click.command()
@click.argument("library")
@click.option("--to", "dest", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option(
    "--format",
    "form",
    default="peft",
    type=click.Choice(FORMATS),
    help="peft: adapter folders. dense: the base with the expert in its weights. gguf: LoRA files "
    "for llama.cpp. stacked: one LoRA that is the weighted sum of all, exactly.",
)
@click.option("--expert", "names", multiple=True, help="An expert; again for more. All if none.")
@click.option("--base", help="Base model, a folder or hub id; the expert's own if not given.")
@click.option("--weights", help="For stacked: NAME=W,NAME=W ...; 1/n each if not given.")
@click.option("--name", help="For stacked: what to call the result.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def export(
    library: str,
    dest: Path,
    form: str,
    names: tuple[str, ...],
    base: str | None,
    weights: str | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Export experts of LIBRARY into a folder: each becomes DEST/NAME, or DEST/NAME.gguf."""
    from mttl_adapters.errors import AdapterError
    from mttl_experts import ExpertLibrary
    from mttl_experts.errors import UnsupportedAdapterError

    if form != "stacked" and (weights or name):
        raise click.UsageError("--weights and --name are for --format stacked")
    with known_errors(AdapterError):
        opened = ExpertLibrary.get_expert_library(library, selection=list(names) or None)
        chosen = list(opened)
        if not chosen:
            raise click.ClickException(f"{opened.uri} has no experts to export")
        if form == "dense" and not names and len(chosen) > 1:
            raise click.ClickException(
                f"{opened.uri} has {len(chosen)} experts, and each dense checkpoint is as large as "
                "its base; name those wanted with --expert"
            )
        made: list[Path] = []
        with bar(f"exporting {form}", None, stderr=as_json) as shown:
            if form == "stacked":
                made.append(_stacked(opened, dest, weights, name, shown.update))
            for done, each in enumerate(chosen if form != "stacked" else ()):
                if form != "dense":
                    shown.update("", done, len(chosen))
                try:
                    made.append(_one(form, opened[each], opened, dest, base, shown.update))
                except UnsupportedAdapterError as error:
                    written = f" ({len(made)} before it are written)" if made else ""
                    raise click.ClickException(f"{error}{written}") from error
    if as_json:
        click.echo(json.dumps({"format": form, "made": [str(path) for path in made]}, indent=1))
        return
    for path in made:
        say(path)


def _one(
    form: str, expert: Expert, library: ExpertLibrary, dest: Path, base: str | None, progress: Any
) -> Path:
    if form == "peft":
        library.path(expert.name)  # says so if there are no weights yet
        library.repository.materialize(dest, [f"experts/{expert.name}"])
        return dest / expert.name
    if form == "dense":
        from mttl_experts.interop import export_dense

        folder = _base_folder(expert, base, whole=True)
        export_dense(expert, folder, dest / expert.name, base_name=base, progress=progress)
        return dest / expert.name
    from mttl_experts.interop import export_gguf

    config = json.loads((_base_folder(expert, base, whole=False) / "config.json").read_text())
    path = dest / f"{expert.name}.gguf"
    export_gguf(expert, config, path)
    return path


def _stacked(
    library: ExpertLibrary, dest: Path, weights: str | None, name: str | None, progress: Any
) -> Path:
    """One LoRA whose ΔW is the weighted sum, as a PEFT folder."""
    from mttl_experts import check_expert_name
    from mttl_routing import merge

    method = "uniform" if weights is None else "weighted"
    given = None if weights is None else weights_of(weights, list(library))
    merged = merge(
        list(library.values()), method, weights=given, name=name or "stacked", progress=progress
    )
    folder = dest / check_expert_name(merged.name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in merged.files().items():
        (folder / file).write_bytes(content)
    return folder


def _base_folder(expert: Expert, base: str | None, whole: bool) -> Path:
    """Folder of the base model; what is on the hub is downloaded, all of it or its config alone."""
    from mttl_adapters.embedded import EMBEDDED_ID, embedded_folder

    wanted = base or expert.expert_info.expert_model
    if wanted is None:
        raise click.ClickException(
            f"expert {expert.name!r} does not say what its base is; name it with --base"
        )
    if Path(wanted).expanduser().is_dir():
        return Path(wanted).expanduser()
    if wanted in ("embedded", EMBEDDED_ID):
        return embedded_folder()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json"]
    if whole:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    revision = None if base else expert.expert_info.model_revision
    try:
        return Path(snapshot_download(wanted, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise click.ClickException(
            f"the base {wanted!r} is no folder here and no hub id; name it with --base"
        ) from error
