"""Suggestions for misspelled names."""

from __future__ import annotations

from streamchat.base.suggestions import did_you_mean


def test_the_closest_name_is_suggested() -> None:
    assert did_you_mean("cache_sise", ["seed", "cache_size", "cache_dir"]) == "; did you mean cache_size?"


def test_no_suggestion_if_nothing_is_close() -> None:
    assert did_you_mean("zzz", ["seed", "cache_size"]) == ""
    assert did_you_mean("zzz", []) == ""


def test_the_name_is_shown_as_the_caller_writes_it() -> None:
    assert did_you_mean("hlep", ["help", "quit"], show="/{}".format) == "; did you mean /help?"


def test_the_cutoff_is_the_least_similarity() -> None:
    assert did_you_mean("pythia", ["pythia-70m"], cutoff=0.7) == "; did you mean pythia-70m?"
    assert did_you_mean("pythia", ["pythia-70m"], cutoff=0.9) == ""
