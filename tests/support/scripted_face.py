"""The `streamchat` command with a scripted engine in place of the real one, for tests through pipes and terminals.

    python tests/support/scripted_face.py SCENARIO [ARGUMENTS OF streamchat ...]

SCENARIO is a JSON object: `replies` (texts or the fields of `Reply`), `notes` (sent when the model is ready), and the
keyword arguments of `ScriptedEngine`. `loading` and `load_failure` are fields of their events.
SUBMITTED in the environment names a file that gets each message as a JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from any folder

from tests.support.scripted_engine import Reply, ScriptedEngine


def build(scenario: dict[str, Any], configuration: Configuration) -> ScriptedEngine:
    """The engine of a scenario."""
    scenario = dict(scenario)
    replies = [Reply(**reply) if isinstance(reply, dict) else reply for reply in scenario.pop("replies", [])]
    notes = [ev.Notice(**note) for note in scenario.pop("notes", [])]
    if "load_failure" in scenario:
        scenario["load_failure"] = ev.EngineFailed(**scenario["load_failure"])
    if "loading" in scenario:
        scenario["loading"] = [ev.ModelLoading(**event) for event in scenario["loading"]]
    crash = scenario.pop("crash", "")
    engine = ScriptedEngine(replies, settings=configuration.settings, **scenario)

    report = os.environ.get("SUBMITTED")

    def after_ready(event: ev.Event) -> None:
        if report and isinstance(event, ev.TurnFinished):
            with open(report, "a", encoding="utf-8") as file:
                file.write(json.dumps(event.text) + "\n")
        if isinstance(event, ev.ModelReady):
            for note in notes:
                engine.emit(note)
            if crash:
                engine.fail(crash)

    engine.subscribe(after_ready)
    return engine


def main() -> int:
    """Run streamchat on the scenario of the command line."""
    scenario: dict[str, Any] = json.loads(sys.argv[1])
    broken = scenario.pop("raise", False)

    def make_engine(
        configuration: Configuration, save: bool, session: str | None, agreed_model: str = ""
    ) -> ScriptedEngine:
        if broken:
            raise RuntimeError("a bug\nin the program")
        return build(scenario, configuration)

    cli.make_engine = make_engine
    code = cli.main(sys.argv[2:])
    if report := os.environ.get("LOADED_MODULES"):
        with open(report, "w", encoding="utf-8") as file:
            file.write("\n".join(sys.modules))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
