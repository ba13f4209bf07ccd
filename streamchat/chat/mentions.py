"""Files in messages: `@path` becomes the text of the file.

`\\@path` stays as it is typed, without the backslash; so does an address such as `a@b.c`. A word behind an `@` that is
neither a file nor looks like a path is text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from streamchat.chat import file_access
from streamchat.chat.text import one_line
from streamchat.errors import ConfigError
from streamchat.paths import user_path
from streamchat.units import human_bytes

MAX_BYTES = 2_000_000
"""Of one file. Far more than any cache holds."""
MAX_COMPLETIONS = 50

# "..." for names with spaces
_MENTION = re.compile(r'(?<![\w@])(\\?)@(?:"([^"\n]+)"|([^\s"@]+))')


def expand(message: str) -> str:
    """`message` with the files that it mentions.

    Raises:
        ConfigError: One cannot be read; nothing was sent.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        path, rest = (match[2], "") if match[2] else _without_punctuation(match[3])
        if not match[2] and not _is_path(path):
            return match[0]
        return f"{as_block(path, read_file(path))}{rest}"

    return _MENTION.sub(replace, message)


def _without_punctuation(word: str) -> tuple[str, str]:
    """A path ends before the punctuation of its sentence, unless the file is named so."""
    bare = word.rstrip(".,;:!?)]}'")
    return (word, "") if _exists(word) or not bare else (bare, word[len(bare) :])


def _is_path(word: str) -> bool:
    if _exists(word):
        return True
    return "/" in word or os.sep in word or bool(re.search(r"\.\w{1,8}$", word))


def _exists(word: str) -> bool:
    """Whether there is such a file, as far as who types may know."""
    # (Path.exists raises for a name that is too long)
    return file_access.allowed() and os.path.exists(user_path(word))


def read_file(name: str) -> str:
    """The text of a file.

    Raises:
        ConfigError: It is not there, no file, too large, or not UTF-8 text; or files must not be named here.
    """
    path, shown = user_path(name), one_line(name)
    file_access.require(f"@{shown} (\\@ sends an @ as it is)")
    try:
        if path.is_dir():
            raise ConfigError(f"{shown} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{shown} is no ordinary file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{shown} has {human_bytes(size)}, and at most {human_bytes(MAX_BYTES)} can be sent; name a part of it"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file (\\@ sends an @ as it is)") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown} cannot be read ({reason})") from None
    if b"\0" in content:
        raise ConfigError(f"{shown} is not a text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{shown} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def as_block(name: str, text: str) -> str:
    """The text of a file as a fenced block under its name."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    kind = Path(name).suffix.removeprefix(".")
    return f"{Path(name).name}:\n{fence}{kind if kind.isalnum() else ''}\n{text.rstrip()}\n{fence}\n"


def mention_of(path: str) -> str:
    """`@path`, quoted where it has to be."""
    return f'@"{path}"' if re.search(r"\s", path) else f"@{path}"


def split_path(argument: str) -> tuple[str, str]:
    """(path, rest) of `path rest`, with a path in quotes where it has spaces."""
    match = re.match(r'\s*(?:"([^"]+)"|(\S+))\s*(.*)', argument, re.DOTALL)
    return (match[1] or match[2], match[3].strip()) if match else ("", "")


def mention_under_way(line: str) -> str | None:
    """The path that is being typed at the end of `line`; None where none is."""
    match = re.search(r'(?<![\w@\\])@([^\s"@]*)$', line)
    return match[1] if match else None


def complete_path(typed: str) -> list[tuple[str, str]]:
    """(path, explanation) of files and folders whose path begins with `typed`; folders end with a slash."""
    if not file_access.allowed():
        return []
    folder, _, start = typed.rpartition("/")
    prefix = f"{folder}/" if folder or typed.startswith("/") else ""
    found = []
    try:
        with os.scandir(user_path(prefix)) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".") and not start.startswith(".")
                if hidden or not entry.name.startswith(start) or re.search(r'[\s"]', entry.name):
                    continue
                if entry.is_dir():
                    found.append((f"{prefix}{entry.name}/", "folder"))
                elif entry.is_file():
                    found.append((f"{prefix}{entry.name}", human_bytes(entry.stat().st_size)))
    except (OSError, ValueError):
        return []
    return sorted(found)[:MAX_COMPLETIONS]
