"""Files in messages: `@path` becomes the text of the file.

Only existing files are sent; anything else after an `@` is plain text, so every message can be sent:

- `@path` or `@"path"` of a regular file is replaced by its text, or refused if it is not readable as text.
- `@./x`, `@../x` and `@~/x` are always paths: refused if no such file exists.
- Any other word is sent as typed. If it looks like a file (a common suffix, or an existing folder before a slash), a
  notice says that no file was sent.
- Code (fenced or inline) and addresses such as `a@b.c` are never mentions; `\\@` is a literal @.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line
from streamchat.base.text_files import read_text
from streamchat.frontend import file_access
from streamchat.frontend.code_spans import code_spans

MAX_BYTES = 2_000_000
"""Maximum size of one file, far more than a cache holds."""
MAX_COMPLETIONS = 50
MAX_CUTS = 64
"""Candidate name ends to try per word, such as `demo.txt` in `demo.txt的内容`."""
MAX_NAMED = 3
"""Files listed in a notice."""

SUFFIXES = {
    *("bat", "c", "cc", "cfg", "conf", "cpp", "cs", "css", "csv", "diff", "env", "go", "h", "hpp"),
    *("html", "ini", "ipynb", "java", "jl", "js", "json", "jsonl", "jsx", "kt", "log", "lua", "md", "mjs"),
    *("patch", "php", "pl", "py", "pyi", "r", "rb", "rs", "rst", "scala", "sh", "sql", "srt", "swift"),
    *("tex", "toml", "ts", "tsv", "tsx", "txt", "vue", "xml", "yaml", "yml"),
}
"""Suffixes of common text files."""

# "..." for names with spaces. The lookbehind excludes addresses, URLs and words.
_MENTION = re.compile(r'(?<![A-Za-z0-9_/@\\])(\\?)@(?:"([^"\n]+)"|([^\s"@]+))')
_PATH_PREFIXES = ("./", "../", "~/")
# punctuation or a non-ASCII character (scripts without spaces); a dot only if no suffix follows
_END = re.compile(r"[,;:!?)\]}'>`*|]|[^\x00-\x7f]|\.+(?=$|[,;:!?)\]}'>`*|]|[^\x00-\x7f])")


@dataclass(frozen=True)
class ExpandedMessage:
    """A message with the text of its files."""

    text: str
    missing: tuple[str, ...] = ()
    """Names that look like files but do not exist."""

    @property
    def notice(self) -> str:
        """Notice about missing files; '' if none are missing."""
        if not self.missing:
            return ""
        named = ", ".join(map(one_line, self.missing[:MAX_NAMED]))
        more = len(self.missing) - MAX_NAMED
        rest = f" and {plural(more, 'other')}" if more > 0 else ""
        why = "no such file" if file_access.allowed() else f"@file is off {file_access.reason()}"
        return f"{named}{rest}: {why}; sent as text"


def expand(message: str) -> ExpandedMessage:
    """Replace the mentions in `message` by the text of the files.

    Raises:
        ConfigError: A file is not readable, or an explicit path (`./`, `../`, `~/`) does not exist.
    """
    spans = code_spans(message) if "@" in message else []
    starts = [start for start, _ in spans]
    missing: dict[str, None] = {}

    def replace(match: re.Match[str]) -> str:
        before = bisect_right(starts, match.start()) - 1
        if before >= 0 and match.start() < spans[before][1]:
            return match[0]  # code
        if match[1]:
            return match[0][1:]
        name, rest = (match[2], "") if match[2] else _file_in(match[3])
        if _is_file(name) or name.startswith(_PATH_PREFIXES):
            return f"{file_block(name, _read(name))}{rest}"
        if not _in_a_word(match) and _looks_like_a_file(name):
            missing[name] = None
        return match[0]

    return ExpandedMessage(_MENTION.sub(replace, message), tuple(missing))


def _read(name: str) -> str:
    try:
        return read_file(name)
    except ConfigError as error:
        raise ConfigError(f"{error} (use \\@ instead of @ to send the name as text)") from None


def _file_in(word: str) -> tuple[str, str]:
    """Split `word` into the longest prefix that is a file and the rest; without a file, at the first possible end.

    A name can end at punctuation or, for scripts without spaces, at a non-ASCII character.
    """
    ends = [match.start() for match in islice(_END.finditer(word, 1), MAX_CUTS)]
    for end in [len(word), *reversed(ends)]:
        if _is_file(word[:end]):
            return word[:end], word[end:]
    end = ends[0] if ends else len(word)
    return word[:end], word[end:]


def _in_a_word(match: re.Match[str]) -> bool:
    """Whether a letter with upper and lower case precedes the @, as in the address `josé@example.md`."""
    before = match.string[match.start() - 1 : match.start()]
    return before.isalpha() and before.lower() != before.upper()


def _looks_like_a_file(name: str) -> bool:
    suffix = os.path.splitext(name)[1].removeprefix(".").lower()
    if suffix in SUFFIXES:
        return True
    if not file_access.allowed():
        return name.startswith("/")
    folder = re.match(r"/?[^/]+(?=/)", name)
    return folder is not None and os.path.isdir(user_path(folder[0]))


def _is_file(name: str) -> bool:
    """Whether the file exists; always False if file access is refused."""
    # (Path.is_file raises for a name that is too long)
    return file_access.allowed() and os.path.isfile(user_path(name))


def read_file(name: str) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: The file does not exist, is not a regular file, is too large or not UTF-8 text, or file access is
            refused.
    """
    shown = one_line(name)
    file_access.require(f"@{shown} (\\@ sends a literal @)")
    text = read_text(name, max_bytes=MAX_BYTES, regular=True).text
    if not text.strip():
        raise ConfigError(f"{shown} is empty")
    return text


def file_block(name: str, text: str) -> str:
    """Format the text of a file as a fenced block under its name."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    kind = Path(name).suffix.removeprefix(".")
    return f"{Path(name).name}:\n{fence}{kind if kind.isalnum() else ''}\n{text.rstrip()}\n{fence}\n"


def mention_of(path: str) -> str:
    """`@path`, quoted if necessary."""
    return f"@{quoted(path)}"


def quoted(path: str) -> str:
    """The path, in quotes if it has spaces."""
    return f'"{path}"' if re.search(r"\s", path) else path


def split_path(argument: str) -> tuple[str, str]:
    """Split `path rest` into (path, rest); a path with spaces is quoted."""
    match = re.match(r'\s*(?:"([^"]+)"|(\S+))\s*(.*)', argument, re.DOTALL)
    return (match[1] or match[2], match[3].strip()) if match else ("", "")


def partial_mention(line: str) -> str | None:
    """The partly typed path at the end of `line`; None if there is none."""
    match = re.search(r'(?<![A-Za-z0-9_/@\\])@([^\s"@]*)$', line)
    return match[1] if match else None


def complete_path(typed: str) -> list[tuple[str, str]]:
    """(path, explanation) of files and folders whose path starts with `typed`; folders end with a slash."""
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
                if one_line(entry.name) != entry.name:  # has control characters
                    continue
                if entry.is_dir():
                    found.append((f"{prefix}{entry.name}/", "folder"))
                elif entry.is_file():
                    found.append((f"{prefix}{entry.name}", human_bytes(entry.stat().st_size)))
    except (OSError, ValueError):
        return []
    return sorted(found)[:MAX_COMPLETIONS]
