"""The sentences of all front ends: about events (see `presenter`), sessions, search results and quotes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.formatting import (
    format_turns,
    human_bytes,
    human_count,
    human_seconds,
    human_speed,
    human_when,
    plural,
)
from streamchat.base.sanitize import one_line
from streamchat.base.thinking import THINK, split, word_count
from streamchat.frontend.status_table import cache_short
from streamchat.sessions.transcripts.messages import counted
from streamchat.store.records import SearchHit, SessionInfo

if TYPE_CHECKING:  # only an import needs it
    from streamchat.sessions.transcripts.imported import ImportedSession

EXCERPT_WORDS = 24
QUOTE_REPLY = "Noted."
"""The supplied reply to a quoted message."""
SUMMARY_HINT = "Edit the summary if you like, then pin it with /keep."
TURN_FAILED = "the turn failed and was rolled back"
STOPPED_EARLY = "Stopped before the reply started; turn undone."
EVICTED_RESTORED = "tokens evicted for it were restored"
"""After the end of a turn that was rolled back."""


# --- the model and its cache ----------------------------------------------------------------------------------


def fetching_text(name: str, event: ev.ModelFetching | None) -> str:
    """`Fetching EleutherAI/pythia-410m: 46.5 MB of 911 MB (5 %)`."""
    if event is None:
        return f"Fetching {one_line(name)} ..."
    return loading_text(ev.ModelLoading(event.stage, event.done, event.total, event.unit))


def fetched_sentence(event: ev.ModelFetched) -> str:
    """Sentence about the end of a fetch; '' if the model is there, because it is loaded next."""
    if event.canceled:
        return f"Fetching {event.name} was canceled; what was fetched is kept for the next try"
    return f"{event.error}; keeping the current model" if event.error else ""


def loading_text(event: ev.ModelLoading) -> str:
    """`Fetching SmolLM2-135M-Instruct: 46.5 MB of 92.9 MB (50 %)`."""
    stage = one_line(event.stage)
    if not event.total:
        return f"{stage}: {human_bytes(event.done)}" if event.unit == "bytes" and event.done else f"{stage} ..."
    share = f"{100 * event.done // event.total} %"
    if event.unit == "bytes":
        return f"{stage}: {human_bytes(event.done)} of {human_bytes(event.total)} ({share})"
    return f"{stage} ... {share}"


def model_facts(event: ev.ModelReady) -> str:
    """`SmolLM2-135M-Instruct · 134.5 M weights (269 MB in memory) · bfloat16 on cpu · ready in 2.1 s`.

    The decode step is named if there is a faster one.
    """
    info = event.info
    weights = f"{human_count(info.parameters)} weights ({human_bytes(info.weight_bytes)} in memory)"
    place = f"{info.precision} on {one_line(info.device)}"
    step = [one_line(f"{info.decode_step}: {info.decode_reason}")] if info.decode_reason else []
    ready = f"ready in {human_seconds(event.load_s)}" if event.load_s else "already loaded"
    return " · ".join([one_line(info.name), weights, place, *step, ready])


def cache_capacity(info: ev.ModelInfo) -> str:
    """The cache budget and what is retained of it from the start."""
    system = f", system prompt {plural(info.pinned_tokens, 'token')}" if info.pinned_tokens else ""
    return f"The cache holds {plural(info.cache_size, 'token')} ({plural(info.num_sink_tokens, 'sink')}{system})."


def eviction_sentence(event: ev.TokensEvicted) -> str:
    """Which turns are no longer in context, and how full the cache is now."""
    tokens = plural(event.count, "token")
    partly = [turn for turn in event.turns if turn not in event.turns_gone]
    parts = []
    if event.turns_gone:
        verb = "is" if len(event.turns_gone) == 1 else "are"
        parts.append(f"{format_turns(event.turns_gone)} {verb} no longer in context")
    if partly:
        parts.append(f"{format_turns(partly)} {'is' if len(partly) == 1 else 'are'} now only partly in context")
    what = "; ".join(parts) if parts else "older text is now out of context"
    size = f"{event.cache.cache_size:,}" if event.cache.cache_size else "?"
    return f"{what} ({tokens} evicted, {event.cache_len_after:,} of {size} cached)"


def pinned_sentence(event: ev.TurnPinned) -> str:
    """Confirmation of `/pin` and `/unpin`."""
    what = "pinned: it is never evicted" if event.pinned else "unpinned"
    return f"Turn {event.turn} ({plural(event.tokens, 'token')}) is {what}."


def paged_in_sentence(event: ev.TurnPagedIn) -> str:
    """Confirmation of `/keep N` if the turn was paged in."""
    tokens = plural(event.tokens, "token")
    return (
        f"Turn {event.turn} is back in context and pinned ({tokens} in {event.seconds * 1000:.0f} ms, "
        "without a prefill)."
    )


def recalled_sentence(event: ev.TurnsRecalled) -> str:
    """Which evicted turns were recalled for the running turn."""
    turns, verb = format_turns(event.turns), "is" if len(event.turns) == 1 else "are"
    if not event.tokens:
        return f"{turns.capitalize()} {'stays' if verb == 'is' else 'stay'} in context for this message."
    part = ""
    if event.partly:
        part = ", in part" if len(event.partly) == len(event.turns) else f", {format_turns(event.partly)} in part"
    how = f"{plural(event.tokens, 'token')} in {event.seconds * 1000:.0f} ms"
    return f"{turns.capitalize()} {verb} back in context{part} ({how})."


def suggestion_sentence(event: ev.RecallSuggested) -> str:
    """Which evicted turns match the message of the running turn, and what to type."""
    numbers = " ".join(map(str, event.turns))
    pairs = zip(event.turns, event.excerpts, strict=True)
    turns = "; ".join(f"turn {turn} (“{one_line(excerpt)}”)" for turn, excerpt in pairs)
    verb, them = ("matches", "it") if len(event.turns) == 1 else ("match", "them")
    return f"Evicted, but {verb} this message: {turns}. /retry {numbers} puts {them} back in context and replies again."


# --- turns ----------------------------------------------------------------------------------------------------


def turn_figures(turn: ev.TurnFinished | ev.SavedTurn) -> str:
    """The line of figures of a finished turn, after the reason if its reply was cut off, empty or supplied."""
    stats = turn.stats if isinstance(turn, ev.TurnFinished) else turn
    cache = cache_short(stats.cache_len, stats.cache_size) if isinstance(stats, ev.TurnStats) else ""
    if turn.reply and not stats.new_tokens and stats.ttft_s is None and turn.finish_reason == "stop":
        return " · ".join(filter(None, ["reply supplied, not generated", cache]))
    reason = ""
    if turn.finish_reason == "cancelled":
        reason = "stopped"
    elif turn.finish_reason == "length":
        reason = "stopped at the limit (/set max_new_tokens)"
    elif turn.finish_reason == "loop":
        reason = "stopped: it repeated itself (/set loop_guard)"
    elif not turn.reply:
        reason = "empty reply"
    figures = figures_line(stats.new_tokens, stats.decode_tps, stats.ttft_s)
    return " · ".join(filter(None, [reason, figures, cache]))


def figures_line(new_tokens: int, decode_tps: float | None, ttft_s: float | None) -> str:
    """`12 tokens · 35.1 tok/s · first token 45 ms`."""
    parts = [plural(new_tokens, "token")]
    if decode_tps is not None:
        parts.append(human_speed(decode_tps))
    if ttft_s is not None:
        parts.append(f"first token {human_seconds(ttft_s)}")
    return " · ".join(parts)


def prefill_text(event: ev.PrefillProgress) -> str:
    """`prefill: 512 of 2,048 tokens`."""
    return f"prefill: {event.done:,} of {plural(event.total, 'token')}"


def thought_for(thoughts: str) -> str:
    """The length of a reply's reasoning: `thought for 12 words`."""
    return f"thought for {word_count(thoughts)}"


def undone_sentence(event: ev.TurnUndone) -> str:
    """What `/undo` did and how long it took."""
    text = f"Turn {event.turn} was undone."
    if event.restored:
        tokens = plural(event.restored, "evicted token was", "evicted tokens were")
        how = f"prefill took {human_seconds(event.seconds)}" if event.prefilled else "no prefill needed"
        text += f" {tokens} restored ({how})."
    elif event.prefilled:
        tokens = plural(event.prefilled, "token was", "tokens were")
        text += f" {tokens} prefilled again in {human_seconds(event.seconds)}."
    return text


def rewound_sentence(event: ev.ConversationRewound) -> str:
    """What `/rewind` did, whether the cache is exact, and where the later turns are."""
    text = f"Back at turn {event.turn}; {plural(event.undone, 'turn was', 'turns were')} undone."
    seconds = human_seconds(event.seconds)
    if event.prefilled:
        text += f" {plural(event.prefilled, 'token was', 'tokens were')} prefilled again in {seconds}."
    elif event.is_exact:
        text += f" The cache is exactly as it was then, without a prefill ({seconds})."
    else:
        text += " The same tokens are cached as then; their keys may differ by rounding."
    if event.kept_as:
        text += f" /resume {event.kept_as} continues with the undone turns."
    return text


# --- conversations and sessions -------------------------------------------------------------------------------


def cleared_sentence(event: ev.ConversationCleared) -> str:
    """Confirmation of `/clear` and `/system`."""
    if not event.pinned_tokens:
        return "New conversation."
    return f"New conversation; the system prompt is pinned ({plural(event.pinned_tokens, 'token')})."


def resumed_sentence(event: ev.ConversationResumed) -> str:
    """Which session was resumed, of which one it is a fork, and how its cache was restored."""
    name, cached = f"“{one_line(event.title)}” ({event.session})", plural(event.cache.length, "token")
    if event.parent:
        name += f", a fork of {event.parent} after turn {event.parent_turn},"
    if not event.seconds and not event.prefilled:  # a server had it open
        return f"{name} opened at turn {len(event.turns)}; {cached} cached."
    seconds = human_seconds(event.seconds)
    how = "prefilled again" if event.prefilled else f"restored in {seconds} without prefill"
    return f"{name} resumed at turn {len(event.turns)}; {cached} cached, {how}."


def imported_lines(numbered: Iterable[tuple[int, ImportedSession]]) -> Iterator[str]:
    """One line for each conversation of a file: its number, turns and title."""
    for number, session in numbered:
        yield f"{number:>4}. {plural(len(session.turns), 'turn'):>11}  {one_line(session.title)}"


def imported_sentence(session: str, imported: ImportedSession) -> str:
    """What was imported as `session`, without how to resume it."""
    turns = plural(len(imported.turns), "turn was", "turns were")
    return f"{session}: {turns} imported, “{one_line(imported.title)}”"


def skipped_sentence(sessions: Iterable[ImportedSession]) -> str:
    """What an import skipped; '' for nothing."""
    skipped = sum((imported.skipped for imported in sessions), Counter[str]())
    return f"only text can be imported; skipped: {counted(skipped)}" if skipped else ""


def session_line(info: SessionInfo, now: float, depth: int = 0) -> str:
    """One line of the session list; `depth` is the depth of a fork in the tree."""
    turns = plural(info.turns, "turn")
    name, title = one_line(info.model_name), one_line(info.title)
    return f"{info.id}  {human_when(info.updated, now):<14} {turns:>11}  {name}  {fork_mark(info, depth)}{title}"


def fork_mark(info: SessionInfo, depth: int) -> str:
    """Return the prefix of a fork's title, indented by its depth in the tree; '' if its parent is not shown."""
    return f"{'  ' * (depth - 1)}└ from turn {info.parent_turn}: " if depth else ""


def search_hit_line(number: int, found: SearchHit, now: float, here: str | None, thinking: str) -> str:
    """One line of search results."""
    who = "you" if found.role == "user" else "model"
    place = f"turn {found.turn}" if found.session == here else f"{found.session}, turn {found.turn}"
    undone = ", undone" if found.undone else ""
    return f"{number:>3}. {human_when(found.at, now)}, {place}, {who}{undone}: {excerpt(found, thinking)}"


def excerpt(found: SearchHit, thinking: str) -> str:
    """The excerpt of a search result, without reasoning tags.

    With `thinking = hide`, an excerpt from the reasoning is replaced by the beginning of the answer.
    """
    text = " ".join(found.excerpt.replace(THINK.opening, " ").replace(THINK.closing, " ").split())
    if found.role == "user":
        return found.excerpt
    thoughts, answer = split(found.text)
    if thinking != "hide" or not thoughts or text.strip("…") in " ".join(answer.split()):
        return text
    return " ".join([*answer.split()[:EXCERPT_WORDS], "…"]) if answer else "(only reasoning)"


def quote_prompt(found: SearchHit, now: float) -> str:
    """The prompt that quotes a search result to the model."""
    who = "I said" if found.role == "user" else "you said"
    text = found.text if found.role == "user" else split(found.text)[1] or found.text
    lines = "\n".join(f"> {line}" for line in text.splitlines())
    return f"Remember what {who} {human_when(found.at, now)}:\n\n{lines}"


def note_prompt(text: str) -> str:
    """The prompt that gives the model a summary or a note to keep."""
    return f"Remember this about our conversation so far:\n\n{text}"
