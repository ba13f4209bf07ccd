"""Names of GGUF files on the Hub: `owner/repo:TAG` and `owner/repo/file.gguf`. Uses no network and no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.base.suggestions import did_you_mean

PREFERRED = ("Q4_K_M", "Q8_0")
"""Tags that are tried without a tag, as by llama.cpp; then the first file."""
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
HUB_ID = re.compile(rf"{_PART}(/{_PART})?")
_WITH_TAG = re.compile(rf"(?P<repo>{_PART}/{_PART}):(?P<tag>[A-Za-z0-9][\w.-]{{0,63}})", re.ASCII)
_WITH_FILE = re.compile(rf"(?P<repo>{_PART}/{_PART})/(?P<path>[^\\:]{{1,200}}\.gguf)", re.ASCII | re.IGNORECASE)
_SPLIT = re.compile(r"-\d{5}-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_NO_MODEL = re.compile(r"(^|/)[^/]*(mmproj|imatrix)[^/]*$", re.IGNORECASE)
"""Files that go with a model: a projector for images, statistics of quantization."""
MAX_LISTED = 8


@dataclass(frozen=True)
class GgufName:
    """A GGUF file of a repository on the Hub."""

    repo_id: str
    tag: str = ""
    """Quantization, as in the names of the files: 'Q4_K_M'; '' for none."""
    path: str = ""
    """Path in the repository; '' if a tag names it."""

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.path}" if self.path else ":".join(filter(None, (self.repo_id, self.tag)))


def is_hub_id(text: str) -> bool:
    """Return whether `text` has the form of a Hub id."""
    return bool(HUB_ID.fullmatch(text)) and "--" not in text and ".." not in text


def parse_gguf_name(text: str) -> GgufName | None:
    """Return the GGUF file on the Hub that `text` names; None if it has another form."""
    if found := _WITH_TAG.fullmatch(text):
        name = GgufName(found["repo"], tag=found["tag"])
    elif (found := _WITH_FILE.fullmatch(text)) and ".." not in found["path"]:
        name = GgufName(found["repo"], path=found["path"])
    else:
        return None
    return name if is_hub_id(name.repo_id) else None


def is_gguf(path: str) -> bool:
    """Return whether `path` names a GGUF file with the weights of a model, or a part of one."""
    return path.lower().endswith(".gguf") and not _NO_MODEL.search(path)


def matches(name: GgufName, paths: Iterable[str]) -> list[str]:
    """Return the files that `name` means, best first.

    A tag is compared without case with the names of files and folders; `Q4_K` does not match `Q4_K_M`. Without tag and
    path, the order is that of `PREFERRED`, then the others by name.
    """
    found = sorted((path for path in paths if is_gguf(path)), key=lambda path: (len(path), path))
    if name.path:
        exact = [path for path in found if path == name.path]
        return exact or [path for path in found if path.lower() == name.path.lower()]
    if name.tag:
        return [path for path in found if _has_tag(path, name.tag)]
    preferred = [path for tag in PREFERRED for path in found if _has_tag(path, tag)]
    return [*preferred, *sorted(path for path in found if path not in preferred)]


def _has_tag(path: str, tag: str) -> bool:
    return bool(re.search(rf"(^|[^A-Za-z0-9_]){re.escape(tag)}([./-]|$)", path, re.IGNORECASE))


def choose_file(name: GgufName, files: Iterable[str], host: str) -> str:
    """Return the path of the file to fetch.

    Args:
        name: What the user asked for.
        files: Paths in the repository.
        host: Name of the Hub, for the message.

    Raises:
        ModelNotFoundError: The repository has no such file.
        UnsupportedModelError: The file is split into parts.
    """
    paths = [path for path in files if is_gguf(path)]
    found = matches(name, paths)
    whole = [path for path in found if not _SPLIT.search(path)]
    if whole:
        return whole[0]
    available = _describe([path for path in paths if not _SPLIT.search(path)])
    if found:
        count = int(_parts(found[0]))
        raise UnsupportedModelError(
            f"{found[0]} of {name.repo_id} is one of {count} parts, which streamchat does not read; {available}, or "
            "join the parts (`llama-gguf-split --merge`) and give the file to --model"
        )
    what = f"no file {name.path}" if name.path else f"no GGUF file with the tag {name.tag}"
    asked = name.path or name.tag
    hint = did_you_mean(asked, paths if name.path else _tags(paths))
    raise ModelNotFoundError(f"{name.repo_id} on {host} has {what}; {available}{hint}")


def _parts(path: str) -> str:
    found = _SPLIT.search(path)
    assert found is not None
    return found["count"]


def _describe(paths: Sequence[str]) -> str:
    """Return what else can be chosen: the tags of the files, or their names if a tag does not tell them apart."""
    if not paths:
        return "choose another model, because it has no other GGUF file"
    words = _tags(paths)
    shown = words if len(set(words)) == len(paths) else sorted(paths)
    more = f" and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return f"choose from {', '.join(shown[:MAX_LISTED])}{more}"


_TAG = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d[A-Z0-9_]*|TQ\d_\d|MXFP4[A-Z_]*|BF16|F16|F32))(?=[./-]|$)", re.IGNORECASE
)


def _tags(paths: Iterable[str]) -> list[str]:
    """Return the tags in the names of files, sorted."""
    found = (_TAG.findall(path) for path in paths)
    return sorted({tags[-1].upper() for tags in found if tags})
