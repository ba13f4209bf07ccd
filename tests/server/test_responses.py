"""Responses continue an id: the newest one, an earlier one, and one from before a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamchat.server.options import Options
from streamchat.store.store import Store
from tests.support.api_server import Running, serving, session_of


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path) as running:
        yield running


def text_of(response: dict[str, Any]) -> str:
    return str(response["output"][-1]["content"][0]["text"])


def prefilled(response: dict[str, Any]) -> int:
    usage = response["usage"]
    return int(usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"])


def led(api: Running, turns: int, **fields: Any) -> list[dict[str, Any]]:
    """The responses of a conversation."""
    found: list[dict[str, Any]] = []
    for turn in range(turns):
        found.append(api.respond(f"message {turn}", found[-1]["id"] if found else None, **fields))
    return found


def test_only_the_new_input_is_prefilled(api: Running) -> None:
    found = led(api, 12)
    assert len({session_of(each["id"]) for each in found}) == 1
    assert len({prefilled(each) for each in found[1:10]}) == 1
    assert prefilled(found[1]) < prefilled(found[0])
    assert [each["status"] for each in found] == ["incomplete"] * 12
    assert found[3]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found[3]["previous_response_id"] == found[2]["id"]


@pytest.mark.parametrize("live", [1, 4])
def test_every_id_can_be_continued_and_stays_as_it_was(tmp_path: Path, live: int) -> None:
    """Branches of one id have the same past; the greedy reply to the same input is the same."""
    with serving(tmp_path, options=Options(port=0, live=live), cache_size=400) as api:
        found = led(api, 6)
        for turn in (1, 3, 5):
            branch = api.respond(f"message {turn + 1}", found[turn]["id"])
            if turn < 5:
                assert text_of(branch) == text_of(found[turn + 1])
                assert session_of(branch["id"]) != session_of(found[turn]["id"])
        again = api.respond("message 4", found[3]["id"])
        assert text_of(again) == text_of(found[4])
        onward = api.respond("and on", again["id"])
        assert session_of(onward["id"]) == session_of(again["id"])


def test_ids_older_than_the_last_64_are_refused(api: Running) -> None:
    found = led(api, 67, max_output_tokens=1)
    too_old = api.post("responses", {"input": "x", "previous_response_id": found[1]["id"]})
    assert too_old.status_code == 400
    assert too_old.json()["error"]["code"] == "previous_response_too_old"
    assert "the last 64" in too_old.json()["error"]["message"]
    assert api.respond("x", found[2]["id"], max_output_tokens=1)["status"] == "incomplete"


def test_an_id_continues_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        found = led(api, 5)
    with serving(tmp_path) as api:
        newest = api.respond("go on", found[-1]["id"])
        assert session_of(newest["id"]) == session_of(found[-1]["id"])
        assert prefilled(newest) < 30
        branch = api.respond("go on", found[2]["id"])
        assert session_of(branch["id"]) != session_of(found[2]["id"])


@pytest.mark.parametrize("id_", ["resp_abcdef_1_x", "resp_", "x", "resp_../../a_1_b", "resp_abcdef_99999999999_x"])
def test_unknown_ids_are_refused(api: Running, id_: str) -> None:
    answer = api.post("responses", {"input": "x", "previous_response_id": id_})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "previous_response_not_found"


def test_an_id_with_another_stamp_is_refused(api: Running) -> None:
    """A turn that was replaced has another id than the one that took its place."""
    [found] = led(api, 1)
    assert api.post("responses", {"input": "x", "previous_response_id": found["id"] + "0"}).status_code == 404


def test_store_false_keeps_nothing_and_changes_nothing(api: Running, tmp_path: Path) -> None:
    found = led(api, 3)
    secret = api.respond("a secret", found[-1]["id"], store=False)
    assert secret["store"] is False
    assert api.post("responses", {"input": "x", "previous_response_id": secret["id"]}).status_code == 404
    after = api.respond("message 3", found[-1]["id"])
    assert session_of(after["id"]) == session_of(found[-1]["id"])
    with Store(tmp_path / "sessions.db") as store:
        assert len(store.sessions()) == 1
        assert store.search("secret") == []


def test_store_false_changes_nothing_if_nothing_is_saved() -> None:
    """Without a store, the session is in memory only: the reply is given there, and undone."""
    with serving(None, temperature=1.0) as api, serving(None, temperature=1.0) as other:
        found, same = led(api, 12), led(other, 12)
        assert api.respond("a secret", found[-1]["id"], store=False)["store"] is False
        refused = api.post("responses", {"input": "x", "previous_response_id": found[-2]["id"], "store": False})
        assert refused.json()["error"]["code"] == "previous_response_too_old"
        after = api.respond("message 12", found[-1]["id"], seed=7)
        assert text_of(after) == text_of(other.respond("message 12", same[-1]["id"], seed=7))
        assert session_of(after["id"]) == session_of(found[-1]["id"])
        assert prefilled(after) < prefilled(found[0])


def test_an_earlier_id_replaces_the_later_turns_if_nothing_is_saved() -> None:
    with serving(None) as api:
        found = led(api, 4)
        branch = api.respond("another", found[1]["id"])
        assert session_of(branch["id"]) == session_of(found[1]["id"])
        assert api.post("responses", {"input": "x", "previous_response_id": found[2]["id"]}).status_code == 404
        assert api.respond("x", found[0]["id"])["status"]


def test_instructions_are_pinned_with_the_session(api: Running) -> None:
    first = api.respond("hello", instructions="Speak of the sea.")
    assert api.respond("go on", first["id"], instructions="Speak of the sea.")["instructions"] == "Speak of the sea."
    other = api.post("responses", {"input": "x", "previous_response_id": first["id"], "instructions": "Be brief."})
    assert other.status_code == 400
    assert other.json()["error"]["param"] == "instructions"


def test_instructions_of_the_settings_differ_from_other_ones(tmp_path: Path) -> None:
    with serving(tmp_path, system_prompt="Be brief.") as api:
        first = api.respond("hello", instructions="Speak of the sea.")
        for text in ("Be brief.", ""):
            body = {"input": "x", "previous_response_id": first["id"], "instructions": text}
            assert api.post("responses", body).status_code == 400, text
        own = api.respond("hello", instructions="Be brief.")
        assert session_of(api.respond("go on", own["id"], instructions="Be brief.")["id"]) == session_of(own["id"])


@pytest.mark.parametrize("name", ["user", "prompt_cache_key", "safety_identifier"])
def test_another_user_cannot_continue_an_id(api: Running, name: str) -> None:
    first = api.respond("hello", **{name: "a"})
    other = api.post("responses", {"input": "x", "previous_response_id": first["id"], name: "b"})
    assert other.status_code == 404
    assert other.json()["error"]["code"] == "previous_response_not_found"
    for fields in ({name: "a"}, {}):
        assert api.respond("go on", first["id"], **fields)["status"] == "incomplete"


def test_an_input_of_messages(api: Running) -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi!", "annotations": []}],
        },
        {"role": "user", "content": "and now?"},
    ]
    answer = api.post("responses", {"input": items})
    assert answer.status_code == 200
    session = session_of(answer.json()["id"])
    with Store(api.server.model._open_store().path) as store:  # type: ignore[misc]
        first = store.load(session).turns[0]
    assert (first.text, first.reply) == ("hello", "Hi!")


def test_another_model_than_that_of_the_session_is_refused(tmp_path: Path) -> None:
    """A session of another model would be encoded anew, and its replies would be those of two models."""
    from tests.support.real_engine import tiny_loaded

    with serving(tmp_path) as api:
        [found] = led(api, 1)
    with serving(tmp_path, load=lambda *_: tiny_loaded(family="gpt_neox")) as api:
        answer = api.post("responses", {"input": "x", "previous_response_id": found["id"]})
        assert answer.status_code == 404
