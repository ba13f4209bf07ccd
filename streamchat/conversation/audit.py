"""Audits: reads cache and token log back while events are emitted, so that others can judge from events alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.conversation.template.reference import Reference
from streamchat.conversation.template.rendering import UnusableTemplateError
from streamchat.conversation.template.turn_check import FedTurn, turn_difference

if TYPE_CHECKING:
    from streamchat.conversation.conversation import Conversation


class Auditor:
    """Emits every event it is called with, and `CacheAudited` with those that may change the cache.

    Args:
        emit: Emits an event.
        conversation: Returns the active conversation, if there is one. Called on the thread that emits.
    """

    def __init__(self, emit: Callable[[ev.Event], None], conversation: Callable[[], Conversation | None]) -> None:
        self._emit, self._conversation = emit, conversation
        self._reference: Reference | None = None

    def __call__(self, event: ev.Event) -> None:
        """Emit `event` and its audit."""
        if isinstance(event, ev.TurnFinished):
            self._audit("rollback" if event.rolled_back else "turn")
        self._emit(event)
        match event:
            case ev.TokensEvicted():
                self._audit("eviction")
            case ev.TurnPagedIn():
                self._audit("page_in")
            case ev.TurnsRecalled():
                self._audit("recall")
            case ev.TurnUndone():
                self._audit("undo")
            case ev.ConversationResumed():
                self._audit("resume")
            case _:
                pass

    def _audit(self, after: ev.AuditMoment) -> None:
        conversation = self._conversation()
        if conversation is None:
            return
        cache, log = conversation.cache, conversation.log
        turn = None
        if log.turns:
            newest = log.turns[-1]
            difference = self._difference(conversation) if after == "turn" else ""
            turn = ev.AuditedTurn(newest.number, newest.start, newest.prompt_end, newest.end, difference)
        runs = tuple(cache.ledger.runs)
        self._emit(
            ev.CacheAudited(
                after=after,
                lengths=tuple(cache.lengths),
                ledger=runs,
                next_index=cache.ledger.next_index,
                log_tokens=len(log),
                cache_size=cache.cache_size,
                pins=cache.pins,
                compressions=cache.compression_count,
                cache_id=id(cache),
                kv_bytes=cache.kv_bytes,
                ids=tuple(log.ids_at(runs)),
                turn=turn,
            )
        )

    def _difference(self, conversation: Conversation) -> str:
        """Return how the newest turn in the token log differs from its rendering by the chat template; '' if equal."""
        log, encoder, tokenizer = conversation.log, conversation.encoder, conversation.tokenizer
        turn = log.turns[-1]
        if turn.prompt_end is None:
            return ""
        prompt = conversation.settings.system_prompt
        if self._reference is None or self._reference.format != encoder.format:
            self._reference = Reference(tokenizer, encoder.format, prompt)
        # Do not render a long conversation as a whole: the first turn and the one before the newest are enough.
        earlier = log.turns[:-1] if len(log.turns) <= 3 else [log.turns[0], log.turns[-2]]
        history = [(before.text, before.reply) for before in earlier]
        start = earlier[-1].start if earlier else 0
        ids = log.ids[start : turn.end].tolist()
        fed = FedTurn(history, turn.text, turn.reply, ids, turn.prompt_end - start, turn.given)
        try:
            detail = turn_difference(self._reference, tokenizer, encoder.control_ids, fed)
        except UnusableTemplateError:  # the template raises for the texts of this turn
            return ""
        if detail or (turn.given and "newest-turn" not in encoder.format.fallbacks):
            return detail
        reply = log.ids[turn.prompt_end : turn.end].tolist()
        close = encoder.close(turn.reply)  # plain text in some templates, which decoding would show
        if close and reply[-len(close) :] == close:
            del reply[-len(close) :]
        fed_text = tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        is_same = _same_text(fed_text, turn.reply) or _same_text(conversation.text_of(reply), turn.reply)
        return "" if is_same else f"the reply {turn.reply[-200:]!r} is fed as {fed_text[-200:]!r}"


def _same_text(fed: str, shown: str) -> bool:
    """Compare without surrounding white space and truncated characters, which are not shown."""
    fed, shown = fed.strip().rstrip("\N{REPLACEMENT CHARACTER}"), shown.strip().rstrip("\N{REPLACEMENT CHARACTER}")
    return fed == shown
