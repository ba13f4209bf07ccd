"""The slash commands that every face has."""

from __future__ import annotations

from streamchat.base.formatting import human_bytes, human_seconds, parse_whole_number, plural
from streamchat.config import loader
from streamchat.config.settings import setting_fields, spec_of
from streamchat.frontend import file_access, mentions
from streamchat.frontend.model_names import complete_model
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.frontend.slash.session_commands import SessionCommands
from streamchat.frontend.status import memory_figures, parts_words


def default_registry() -> SlashRegistry:
    """The commands that every face has."""
    registry = SlashRegistry([])

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            command = registry.find(argument.lstrip("/").lower())
            if command is None:
                return SlashResult(f"/{argument.lstrip('/')} is not a command; /help lists them", error=True)
            return SlashResult(f"/{command.name} {command.arguments}".rstrip() + f"  {command.help}")
        return SlashResult(registry.help_text())

    def complete_help(context: SlashContext, argument: str) -> list[tuple[str, str]]:
        return [(c.name, c.help) for c in registry if c.name.startswith(argument)]

    for command in (
        SlashCommand("help", "[COMMAND]", "list the commands", show_help, ("h", "?"), complete_help),
        SlashCommand(
            "clear",
            "",
            "forget the conversation; keep model, system prompt and settings",
            _clear,
            ("new",),
            starts_over=lambda argument: True,
        ),
        SlashCommand(
            "system",
            "[TEXT]",
            "show the system prompt, or start over with another one ('none' removes it)",
            _system,
            starts_over=bool,
        ),
        SlashCommand(
            "model",
            "[NAME]",
            "show the model, or load another one and start over with it",
            _model,
            complete=_complete_model,
            starts_over=bool,
        ),
        SlashCommand(
            "pin",
            "[TURN]",
            "keep a turn in the cache (the last one by default)",
            _pin,
            complete=_complete_pin,
            asks_engine=True,
        ),
        SlashCommand(
            "unpin",
            "[TURN]",
            "let a pinned turn leave again",
            _unpin,
            complete=_complete_unpin,
            asks_engine=True,
        ),
        SlashCommand(
            "read",
            "FILE [TEXT]",
            "send a text file with a message, or put @FILE into the input",
            _read,
            complete=_complete_read,
        ),
        SlashCommand("set", "[NAME [VALUE]]", "show or change a setting for the next turns", _set, (), _complete_set),
        SlashCommand("stats", "", "cache, memory and speed so far", _stats, ("status",)),
    ):
        registry.add(command)
    SessionCommands().add_to(registry)
    registry.add(SlashCommand("quit", "", "leave", lambda context, argument: SlashResult(quit=True), ("exit", "q")))
    return registry


def _clear(context: SlashContext, argument: str) -> SlashResult:
    context.engine.clear()
    return SlashResult()


def _system(context: SlashContext, argument: str) -> SlashResult:
    if not argument:
        return SlashResult(_system_words(context))
    context.engine.set_system_prompt("" if argument.lower() == "none" else argument)
    return SlashResult()


def _system_words(context: SlashContext) -> str:
    prompt, info = context.engine.settings.system_prompt, context.board.info
    if prompt:
        return f"system prompt: {prompt}"
    if info is None:
        return "system prompt: none set; the chat template's own is used"
    if not info.template_prompt:
        return "system prompt: none"
    return f"system prompt: none set; the chat template's own is pinned:\n{info.template_prompt}"


def _live_settings() -> list[str]:
    return [name for name in setting_fields() if spec_of(name).live]


def _set(context: SlashContext, argument: str) -> SlashResult:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.strip().lower().replace("-", "_"), value.strip()
    settings = context.engine.settings
    if not name:
        rows = [f"{key} = {getattr(settings, key)}  ({spec_of(key).legal()})" for key in _live_settings()]
        return SlashResult("\n".join(rows))
    if name not in setting_fields():
        return SlashResult(f"{name} is not a setting; /set lists those that can be changed here", error=True)
    if not value:
        return SlashResult(f"{name} = {getattr(settings, name)}  ({spec_of(name).help}; {spec_of(name).legal()})")
    if not spec_of(name).live:
        return SlashResult(
            f"{name} cannot change during a chat; start with {loader.flag_of(name)} or put it into config.toml",
            error=True,
        )
    checked = loader.check_value(name, loader.parse_text(name, value, "/set"), "/set")
    context.engine.set_option(name, checked)
    return SlashResult(f"{name} = {checked} from the next turn on")


def _complete_set(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    name, space, value = argument.partition(" ")
    settings = context.engine.settings
    if not space:
        return [(key, f"now {getattr(settings, key)}") for key in _live_settings() if key.startswith(name)]
    if name not in _live_settings():
        return []
    now = getattr(settings, name)
    choices = [choice for choice in spec_of(name).choices if choice.startswith(value.lstrip())]
    return [(f"{name} {choice}", "now" if choice == now else "") for choice in choices]


def _stats(context: SlashContext, argument: str) -> SlashResult:
    board = context.board
    cache = board.cache
    rows: list[tuple[str, str]] = []
    if board.info is not None:
        info = board.info
        rows.append(
            (
                "model",
                f"{info.name} ({info.precision} on {info.device}, {human_bytes(info.weight_bytes)} in memory)",
            )
        )
    rows.append(("cache length", f"{cache.length:,} / {plural(cache.cache_size, 'token')} ({parts_words(cache)})"))
    rows.append(("compressions", f"{cache.compressions:,} ({plural(cache.tokens_evicted, 'token')} evicted)"))
    rows.append(
        (
            "KV cache",
            f"{human_bytes(cache.kv_bytes)} allocated ({human_bytes(cache.full_kv_bytes)} needed without eviction)",
        )
    )
    rows += memory_figures(board.memory)
    rows.append(
        ("turns", f"{board.turns:,} ({plural(board.prompt_tokens, 'token')} read, {board.new_tokens:,} written)")
    )
    if board.ttft_s is not None:
        rows.append(("first token", human_seconds(board.ttft_s)))
    if board.decode_tps is not None:
        rows.append(("speed", f"{board.decode_tps:.1f} tok/s"))
    width = max(len(label) for label, _ in rows)
    return SlashResult("\n".join(f"{label:<{width}}  {value}" for label, value in rows))


# --- the model -------------------------------------------------------------------------------------------------


def _model(context: SlashContext, argument: str) -> SlashResult:
    if argument:
        _require_name(context, argument)
        context.engine.switch_model(argument)
        return SlashResult()
    info = context.board.info
    if info is None:
        return SlashResult(f"{context.engine.settings.model} is being loaded")
    return SlashResult(f"{info.name} ({info.precision} on {info.device}), from {info.source}")


def _require_name(context: SlashContext, argument: str) -> None:
    """Where files must not be named, a model is named by alias or Hub id, or is the one that the start named."""
    from streamchat.models.resolve import is_local

    if argument != context.engine.settings.model and not file_access.allowed() and is_local(argument):
        file_access.require("/model with a folder or a file")


def _complete_model(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return complete_model(argument)


# --- pins ------------------------------------------------------------------------------------------------------


def _pin(context: SlashContext, argument: str) -> SlashResult:
    turn = _turn_of(context, argument)
    if isinstance(turn, SlashResult):
        return turn
    context.engine.pin(turn)
    return SlashResult()


def _unpin(context: SlashContext, argument: str) -> SlashResult:
    pinned = _pinned_turns(context)
    if not argument and len(pinned) == 1:
        context.engine.unpin(pinned[0])
        return SlashResult()
    if not argument and pinned:
        turns = ", ".join(map(str, pinned))
        return SlashResult(f"turns {turns} are pinned; say which one: /unpin {pinned[-1]}", error=True)
    turn = _turn_of(context, argument)
    if isinstance(turn, SlashResult):
        return turn
    context.engine.unpin(turn)
    return SlashResult()


def _turn_of(context: SlashContext, argument: str) -> int | SlashResult:
    if not argument:
        if not context.board.turns:
            return SlashResult("there is no turn yet", error=True)
        return context.board.turns
    return parse_whole_number(argument) or SlashResult(f"{argument} is not the number of a turn", error=True)


def _pinned_turns(context: SlashContext) -> list[int]:
    return sorted({segment.turn for segment in context.board.cache.segments if segment.turn and segment.pinned})


def _complete_turns(context: SlashContext, argument: str, pinned: bool) -> list[tuple[str, str]]:
    held: dict[int, int] = {}
    for segment in context.board.cache.segments:
        if segment.turn and segment.pinned == pinned:
            held[segment.turn] = held.get(segment.turn, 0) + segment.tokens
    newest = sorted(held.items(), reverse=True)
    return [(str(turn), plural(tokens, "token")) for turn, tokens in newest if str(turn).startswith(argument)]


def _complete_pin(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return _complete_turns(context, argument, pinned=False)


def _complete_unpin(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return _complete_turns(context, argument, pinned=True)


# --- files -----------------------------------------------------------------------------------------------------


def _read(context: SlashContext, argument: str) -> SlashResult:
    file_access.require("/read")
    path, text = mentions.split_path(argument)
    if not path:
        return SlashResult("which file? /read FILE [TEXT]", error=True)
    mention = mentions.mention_of(path)
    content = mentions.read_file(path)  # says what is wrong with it
    if text:
        return SlashResult(message=f"{mention} {text}")
    lines = content.count("\n") + (not content.endswith("\n"))
    size = f"{plural(lines, 'line')}, {human_bytes(len(content.encode()))}"
    return SlashResult(f"{path} ({size}) goes with the next message", insert=f"{mention} ")


def _complete_read(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return [] if " " in argument else mentions.complete_path(argument)
