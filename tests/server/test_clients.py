"""Real clients hold a conversation of 20 turns: it is one session, and each request prefills its own message."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamchat.store.store import Store
from tests.support.api_server import Running, serving

TURNS = 20
MODELS = """
- model_id: streamchat
  model_name: tiny
  api_base: {base}/v1
"""
LLM = """
import llm

conversation = llm.get_model("streamchat").conversation()
for number in range({turns}):
    conversation.prompt(f"message {{number}} about the sea", key="none").text()
"""
OPENAI = """
import openai, sys

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
messages = []
for number in range({turns}):
    messages.append({{"role": "user", "content": f"message {{number}} about the sea"}})
    completion = client.chat.completions.create(model="tiny", messages=messages)
    messages.append(completion.choices[0].message)
"""
ONLY_NEW = """
import openai, sys

client, previous = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none"), None
for number in range({turns}):
    more = {{"previous_response_id": previous}} if previous else {{}}
    for event in client.responses.create(model="tiny", input=f"message {{number}} about the sea", stream=True, **more):
        pass
    previous = event.response.id
"""
PYDANTIC_AI = """
import sys
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="none")
agent = Agent(OpenAIChatModel("tiny", provider=provider), instructions="You are a helpful assistant of the sea.")
history = []
for number in range({turns}):
    history = agent.run_sync(f"message {{number}} about the sea", message_history=history).all_messages()
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, max_new_tokens=6) as running:
        yield running


@pytest.mark.parametrize(
    ("package", "program"),
    [
        pytest.param("llm", LLM, id="llm"),
        pytest.param("openai", OPENAI, id="openai, the whole history"),
        pytest.param("openai", ONLY_NEW, id="openai, new messages"),
        pytest.param("pydantic_ai", PYDANTIC_AI, id="pydantic-ai"),
    ],
)
def test_a_client_holds_20_turns(api: Running, tmp_path: Path, package: str, program: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(base=api.base))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    command = [sys.executable, "-c", program.format(turns=TURNS), api.base]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with Store(tmp_path / "sessions.db") as store:
        [session] = store.sessions()
        turns = store.load(session.id).turns
    assert [turn.text for turn in turns] == [f"message {number} about the sea" for number in range(TURNS)]
    prompts = [(turn.stats or {})["prompt_tokens"] for turn in turns]
    assert max(prompts[10:]) <= min(prompts[10:]) + 2
