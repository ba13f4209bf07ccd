"""`streamchat models [NAME]`: list models that can be loaded, or explain what a name means."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from streamchat.base.formatting import human_bytes
from streamchat.base.sanitize import printable
from streamchat.models import catalogue
from streamchat.models.bundled.default import (
    NAME,
    WHEEL,
    default_model_dir,
    download_description,
    is_default_model_here,
)
from streamchat.models.folder import inspect
from streamchat.models.hub_cache import cached_ggufs, cached_models, endpoint, hub_cache_dir
from streamchat.models.hub_gguf import parse_gguf_name
from streamchat.models.resolve import Source, resolve
from streamchat.models.staging import models_dir, read_manifest

HELP = "list the models that can be loaded, or explain a model name"
DESCRIPTION = (
    "List the models that can be loaded, and mark those on this machine; with NAME, explain that name. "
    "Nothing is fetched."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="alias, Hub id, owner/repo:TAG, folder or .gguf file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ModelError: NAME is not a model that can be loaded.
    """
    if args.name:
        report = describe(args.name)
        text = _describe_text(report)
    else:
        report = inventory()
        text = _inventory_text(report)
    # names of folders and files may contain control characters
    sys.stdout.write((json.dumps(report, indent=1) if args.json else printable(text)) + "\n")
    return 0


def inventory() -> dict[str, Any]:
    """Return everything `--model` can name: local models and aliases."""
    here = cached_models()
    ready = {model.repo_id for model in here}
    return {
        "default": {
            "name": NAME,
            "here": is_default_model_here(),
            "folder": str(default_model_dir()),
            "bytes": _folder_bytes(default_model_dir()),
            "download_bytes": WHEEL.size,
        },
        "converted": _converted(),
        "hub_cache": [{"id": model.repo_id, "folder": str(model.folder), "bytes": model.file_bytes} for model in here],
        "hub_ggufs": [
            {"name": f"{gguf.repo_id}/{gguf.file}", "file": str(gguf.path), "bytes": gguf.file_bytes}
            for gguf in cached_ggufs()
        ],
        "aliases": [
            {"alias": alias, "id": repo_id, "here": repo_id in ready} for alias, repo_id in catalogue.ALIASES.items()
        ],
    }


def _converted() -> list[dict[str, Any]]:
    found = []
    folder = models_dir()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        manifest = None if path.name.startswith(".") else read_manifest(path)
        if manifest and not manifest.get("default"):
            source = str(manifest.get("source", ""))
            found.append(
                {
                    "name": str(manifest.get("name", path.name)),
                    "source": source,
                    "source_here": Path(source).is_file(),
                    "folder": str(path),
                    "bytes": _folder_bytes(path),
                }
            )
    return found


def _folder_bytes(folder: Path) -> int:
    manifest = read_manifest(folder)
    return sum(manifest["files"].values()) if manifest else 0


def describe(name: str) -> dict[str, Any]:
    """Return what `name` means, its location, and what loading it would fetch."""
    source = resolve(name)
    if source.kind == "folder":
        inspect(Path(source.location))
    return {
        "name": name,
        "kind": source.kind,
        "model": source.name,
        "location": source.location,
        "id": source.repo_id or None,
        "here": source.available,
        "to_do": _to_do(source),
    }


def _to_do(source: Source) -> str | None:
    if source.kind == "bundled" and not source.available:
        return f"fetch {download_description()}, then convert it once (about 20 s)"
    if source.kind == "gguf":
        from streamchat.models.gguf.convert import copy_folder

        if read_manifest(copy_folder(Path(source.location))) is None:
            return f"convert it once; the copy goes to {models_dir()}"
    if source.kind == "hub" and parse_gguf_name(source.location) is not None:
        return f"fetch the file from {endpoint()} into {hub_cache_dir()}, then convert it once"
    if source.kind == "hub":
        return f"fetch its config, tokenizer and safetensors from {endpoint()} into {hub_cache_dir()}"
    return None


_KINDS = {
    "bundled": "the default model",
    "folder": "a local folder",
    "gguf": "a local GGUF file",
    "hub-cache": "a Hub model, in the local Hub cache",
    "hub": "a Hub model, not fetched yet",
}


def _describe_text(report: dict[str, Any]) -> str:
    what = _KINDS[report["kind"]]
    if report["kind"] == "gguf" and report["id"]:
        what = "a GGUF file of the Hub, in the local Hub cache"
    elif report["kind"] == "hub" and parse_gguf_name(report["name"]) is not None:
        what = "a GGUF file on the Hub, not fetched yet"
    elif report["kind"] == "hub" and catalogue.lookup(report["name"]) is None:
        what = "a valid Hub id; whether such a model exists is only known when it is fetched"
        what += "" if report["here"] else catalogue.did_you_mean(report["name"])
    rows = [("model", report["model"]), ("what", what)]
    if report["id"]:
        rows.append(("Hub id", report["id"]))
    if report["location"] != report["id"]:
        rows.append(("location", report["location"]))
    rows.append(("here", "yes" if report["here"] else "no"))
    if report["to_do"]:
        rows.append(("first use", report["to_do"]))
    return "\n".join(f"{label:<10}{value}" for label, value in rows)


def _inventory_text(report: dict[str, Any]) -> str:
    default = report["default"]
    state = (
        f"here, {human_bytes(default['bytes'])} on disk"
        if default["here"]
        else f"not fetched yet: {human_bytes(default['download_bytes'])}"
    )
    lines = ["Default model", f"  {'default':<22}{default['name']}  ({state})", ""]
    if report["converted"]:
        lines.append("Converted GGUF files (sizes on disk)")
        for model in report["converted"]:
            gone = "" if model["source_here"] else "  (file missing)"
            lines.append(f"  {model['name']:<38}{human_bytes(model['bytes']):>9}{gone}")
            lines.append(f"    {model['source']}")
        lines.append("")
    lines.append(f"Local Hub cache ({hub_cache_dir()}; sizes on disk)")
    lines += [f"  {model['id']:<50}{human_bytes(model['bytes']):>9}" for model in report["hub_cache"]]
    if not report["hub_cache"]:
        lines.append("  no causal language models")
    if report["hub_ggufs"]:
        lines += ["", "GGUF files in the local Hub cache"]
        lines += [f"  {gguf['name']:<66} {human_bytes(gguf['bytes']):>9}" for gguf in report["hub_ggufs"]]
    lines += ["", "Aliases (fetched from the Hub on first use)"]
    for row in report["aliases"]:
        lines.append(f"  {row['alias']:<22}{row['id']:<42}{'here' if row['here'] else ''}".rstrip())
    lines += [
        "",
        "--model also accepts any Hub id (owner/name), a GGUF file of the Hub",
        "(owner/name:Q4_K_M or owner/name/file.gguf), a model folder or a .gguf file.",
    ]
    return "\n".join(lines)
