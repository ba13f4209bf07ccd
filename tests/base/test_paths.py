"""Paths of cached files."""

from __future__ import annotations

from streamchat.base import paths


def test_the_path_of_a_cached_file_is_the_same_at_every_start() -> None:
    """Another path would leave the file of an earlier version behind."""
    path = paths.cache_path("verdicts", '{"dtype": "torch.float32"}', ".json")
    assert path.relative_to(paths.cache_dir()).as_posix() == "verdicts/d712f865d1bd756a96a3b95e5a584da1.json"
    assert path == paths.cache_path("verdicts", b'{"dtype": "torch.float32"}', ".json")
    assert path.stem != paths.cache_path("verdicts", '{"dtype": "torch.float16"}', ".json").stem


def test_a_home_that_cannot_exist_is_a_name() -> None:
    for name in ("~\0", "~no\0body/x", "~nobody-here/x", "~\udcff"):
        assert str(paths.user_path(name)) == name
