"""streamchat: a terminal chat that never ends, on one persistent KV cache (StreamingLLM eviction).

Importing the package loads neither torch nor Textual; public names are resolved on first use. It imports nothing at
all: see `streamchat.__main__`.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # recognized by type checkers, without importing `typing`
if TYPE_CHECKING:
    from streamchat.base import events as events
    from streamchat.cache.hook import StreamingHook as StreamingHook
    from streamchat.cache.press import StreamingPress as StreamingPress
    from streamchat.cache.streaming import StreamingCache as StreamingCache
    from streamchat.scripting.chat import Chat as Chat

__all__ = ["Chat", "StreamingCache", "StreamingHook", "StreamingPress", "__version__", "events"]


def __getattr__(name: str) -> object:
    if name == "Chat":
        from streamchat.scripting.chat import Chat

        return Chat
    if name == "events":
        from streamchat.base import events

        return events
    if name == "StreamingCache":
        from streamchat.cache.streaming import StreamingCache

        return StreamingCache
    if name == "StreamingHook":
        from streamchat.cache.hook import StreamingHook

        return StreamingHook
    if name == "StreamingPress":
        from streamchat.cache.press import StreamingPress

        return StreamingPress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
