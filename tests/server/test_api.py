"""The API as its clients see it: shapes, streams, errors, limits, and who may use it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.atomic_files import write_new
from streamchat.server.access import read_token
from streamchat.server.fields import SAMPLING
from streamchat.server.limits import Limits
from streamchat.server.options import Options
from streamchat.store.store import Store
from tests.support.api_server import Running, serving, session_of

openai = pytest.importorskip("openai", reason="the package openai is not installed")

NUMBERS = (*SAMPLING, "max_tokens", "max_completion_tokens")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("api"), options=Options(port=0, limits=Limits(8, 60, 100_000, 6))) as running:
        yield running


@pytest.fixture
def client(api: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{api.base}/v1", api_key="none", max_retries=0) as made:
        yield made


# --- a real client ------------------------------------------------------------------------------------------------


def test_models(client: Any) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "streamchat")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="gpt-5 is not served"):
        client.models.retrieve("gpt-5")


def test_a_stream_of_chunks_is_the_completion(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, user="one")
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, user="two", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4


def test_a_stream_of_events_is_the_response(client: Any) -> None:
    whole = client.responses.create(model="tiny", input="hello", user="three")
    events = list(client.responses.create(model="tiny", input="hello", user="four", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage
    assert {event.response.id for event in events if hasattr(event, "response")} == {events[0].response.id}


def test_a_client_that_is_gone_stops_its_reply(tmp_path: Path) -> None:
    """What it was shown is kept, and the next request does not wait for the rest."""
    with (
        serving(tmp_path, max_new_tokens=100_000, cache_size=256) as api,
        openai.OpenAI(base_url=f"{api.base}/v1", api_key="none") as client,
    ):
        stream = client.responses.create(model="tiny", input="hello", stream=True)
        for event in stream:
            if event.type == "response.created":
                id_ = event.response.id
            elif event.type == "response.output_text.delta":
                stream.close()
                break
        short = client.responses.create(model="tiny", input="go on", previous_response_id=id_, max_output_tokens=3)
        assert session_of(short.id) == session_of(id_)
        with Store(tmp_path / "sessions.db") as store:
            [first, _] = store.load(session_of(id_)).turns
        assert first.finish_reason == "cancelled"
        assert first.reply


# --- fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_value"),
        ({"n": True}, "n", "unsupported_value"),
        ({"top_logprobs": False}, "top_logprobs", "unsupported_value"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_value"),
        ({"logprobs": 0}, "logprobs", "unsupported_value"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "unsupported_value"),
        ({"parallel_tool_calls": 0.0}, "parallel_tool_calls", "unsupported_value"),
        *(({name: True}, name, "invalid_value") for name in NUMBERS),
        *(({name: [1]}, name, "invalid_value") for name in NUMBERS),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_value"),
        ({"logprobs": True}, "logprobs", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"temprature": 0}, "temprature", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": HELLO * 7}, "messages", "too_many_messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", None),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [1]}]}, "messages[0].tool_calls", None),
        ({"messages": [*HELLO, {"role": "system", "content": "late"}]}, "messages[1]", "invalid_value"),
        ({"messages": [7]}, "messages[0]", "invalid_value"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(
    api: Running, fields: dict[str, Any], param: str, code: str | None
) -> None:
    answer = api.post("chat/completions", {"messages": HELLO} | fields)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert error["param"] == param
    assert code is None or error["code"] == code
    assert param.split("[")[0] in error["message"]


def test_fields_that_ask_for_nothing_are_accepted(api: Running) -> None:
    nothing: dict[str, Any] = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "audio": None,
        "metadata": {},
    }
    assert api.complete(HELLO, **nothing)["object"] == "chat.completion"


@pytest.mark.parametrize(
    "fields",
    [
        {"conversation": "c"},
        {"truncation": "disabled"},
        {"background": True},
        {"background": 0},
        {"stream_options": {"include_obfuscation": 0}},
    ],
)
def test_fields_of_responses_are_refused(api: Running, fields: dict[str, Any]) -> None:
    answer = api.post("responses", {"input": "hello"} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(fields))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[1]", 400),
        (b"{", 400),
        (b'{"model": NaN}', 400),
        (b"\xff", 400),
        (b"[" * 50_000, 400),
        (b'{"a": ' + b"9" * 5000 + b"}", 400),
        (b" " * 100_001, 413),
        (b'{"model": "tiny", "max_tokens": 1, "max_tokens": 2}', 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a", "content": "b"}]}', 400),
    ],
)
def test_bodies_that_are_not_valid(api: Running, body: bytes, status: int) -> None:
    answer = api.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_name_that_occurs_twice_is_refused_by_name(api: Running) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1, "seed": 2}'
    error = api.http.post("/v1/chat/completions", content=body).json()["error"]
    assert (error["param"], error["code"]) == ("seed", "invalid_json")
    assert error["message"] == 'the name "seed" occurs more than once in one object; send it once'


def test_paths_and_methods_that_are_not_served(api: Running) -> None:
    assert api.http.get("/v1/embeddings").status_code == 404
    assert api.http.get("/").json()["error"]["code"] == "not_found"
    assert api.http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_lone_surrogates_are_replaced(api: Running) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
    assert api.http.post("/v1/chat/completions", content=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("responses", b'"previous_response_id": "\\ud800"'),
        ("chat/completions", b'"\\udfff": 1'),
        ("chat/completions", b'"stream": true, "stream_options": {"\\ud800": 1}'),
        ("chat/completions", b'"temperature": 1' + b"0" * 400),
        ("chat/completions", b'"min_p": -1' + b"0" * 400),
        ("chat/completions", b'"temperature": 1e400'),
    ],
)
def test_values_that_no_sentence_or_float_can_hold_are_refused(api: Running, path: str, field: bytes) -> None:
    body = b'{"model": "tiny", "input": "hi", "messages": [{"role": "user", "content": "hi"}], ' + field + b"}"
    unused = b'"messages": [{"role": "user", "content": "hi"}], ' if path == "responses" else b'"input": "hi", '
    answer = api.http.post(f"/v1/{path}", content=body.replace(unused, b""))
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["type"] in ("invalid_request_error", "not_found_error")


# --- limits -------------------------------------------------------------------------------------------------------


def test_200_requests_at_once_are_served_or_refused(api: Running) -> None:
    """Those that are served have whole replies; none hangs, and the server then serves as before."""
    barrier = threading.Barrier(200)

    def ask(number: int) -> tuple[int, str]:
        barrier.wait()
        answer = api.post("responses", {"input": f"message {number}", "max_output_tokens": 2})
        return answer.status_code, answer.headers.get("retry-after", "")

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, range(200)))
    assert set(found) == {(200, ""), (429, "1")}
    assert sum(status == 200 for status, _ in found) >= 8
    assert api.complete(HELLO)["object"] == "chat.completion"
    refused = sum(status == 429 for status, _ in found)
    assert f"streamchat_server_refused_requests_total {float(refused)}" in api.http.get("/metrics").text


def test_requests_of_one_session_are_served_in_order(tmp_path: Path) -> None:
    """Ten at once continue one id: the first continues its session, the others branch from it, and all get a reply."""
    with serving(tmp_path) as api:
        first = api.respond("hello")
        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(lambda n: api.respond(f"message {n}", first["id"]), range(10)))
        assert sum(session_of(each["id"]) == session_of(first["id"]) for each in found) == 1
        assert len({session_of(each["id"]) for each in found}) == 10


def test_a_request_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """It gets what there is; one that has not started gets an error."""
    limits = Limits(seconds=0.5)
    with serving(
        tmp_path, options=Options(port=0, live=1, limits=limits), max_new_tokens=100_000, cache_size=256
    ) as api:
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(api.respond, "hello")
            time.sleep(0.2)
            waiting = api.post("responses", {"input": "hello"})
        assert long.result()["status"] == "incomplete"
        assert waiting.status_code in (200, 504)


def test_replies_take_turns(tmp_path: Path) -> None:
    """A short reply does not wait for the end of a long one."""
    with serving(tmp_path, max_new_tokens=1_000_000, cache_size=256) as api:
        body = {"model": "tiny", "input": "hello", "stream": True}
        with api.http.stream("POST", "/v1/responses", json=body) as long:
            lines = long.iter_lines()
            while "delta" not in next(lines):
                pass
            assert api.respond("hi", max_output_tokens=5)["usage"]["output_tokens"] == 5
            assert "response.incomplete" not in next(lines)


# --- access -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "192.168.0.7"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Authorization": "Bearer anything"}, 200),
    ],
)
def test_other_hosts_and_pages_are_refused(api: Running, headers: dict[str, str], status: int) -> None:
    for path in ("/v1/models", "/metrics"):
        assert api.http.get(path, headers=headers).status_code == status
    if status == 403:
        assert api.post("responses", {"input": "hello"}, **headers).status_code == 403


def test_the_page_of_the_server_itself_may_send_requests(api: Running) -> None:
    assert api.http.get("/v1/models", headers={"Origin": api.base}).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic {}", "{}", "bearer {}", "Bearer  {}"])
def test_the_token_is_needed_elsewhere(tmp_path: Path, header: str | None) -> None:
    file = tmp_path / "token"
    with serving(tmp_path, options=Options("0.0.0.0", 0, token_file=file)) as api:
        token = file.read_text().strip()
        assert api.server.new_token
        assert file.stat().st_mode & 0o777 == 0o600
        assert len(token) > 30
        headers = {} if header is None else {"Authorization": header.format(token)}
        allowed = header in ("bearer {}", "Bearer  {}")
        for path in ("/v1/models", "/metrics", "/nowhere"):
            assert (api.http.get(path, headers=headers).status_code == 401) is not allowed
        assert api.http.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert api.http.get("/v1/models", headers={"Host": "evil.example"} | headers).status_code == 403


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    from streamchat.base.errors import ConfigError

    file = tmp_path / "token"
    token, is_new = read_token(file)
    assert is_new
    assert read_token(file) == (token, False)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="no valid token"):
        read_token(file)


def test_two_servers_that_start_at_once_share_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_is_first(path: Path, text: str, *, durable: bool) -> None:
        write_new(path, "a" * 32, durable=durable)
        write_new(path, text, durable=durable)

    monkeypatch.setattr("streamchat.server.access.write_new", another_is_first)
    assert read_token(tmp_path / "token") == ("a" * 32, False)


def test_answers_have_headers_against_guessing_and_caches(api: Running) -> None:
    for answer in (api.http.get("/v1/models"), api.http.get("/x"), api.post("responses", {"input": "x"})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_served(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with serving(tmp_path, options=Options(port=0, live=2)) as api:
        for name in ("a", "b", "c"):
            api.complete(HELLO, user=name)
        text = api.http.get("/metrics").text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
    assert values["streamchat_turns_total"] == 3
    assert values["streamchat_generated_tokens_total"] == 36
    assert values["streamchat_server_live_sessions"] == 2
    assert values["streamchat_cache_budget_tokens"] == 256
    assert values["gen_ai_server_time_to_first_token_seconds_count"] == 3
    assert values["gen_ai_server_time_per_output_token_seconds_count"] == 3
    assert values["process_resident_memory_bytes"] > 1e7
    assert json.dumps(values)
