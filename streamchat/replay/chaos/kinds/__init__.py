"""The kinds of disturbances, one per module."""

from streamchat.replay.chaos.kind import Kind
from streamchat.replay.chaos.kinds.clients import Clients
from streamchat.replay.chaos.kinds.clock import ClockJump
from streamchat.replay.chaos.kinds.disk import FullDisk
from streamchat.replay.chaos.kinds.load import Load
from streamchat.replay.chaos.kinds.pause import Pause
from streamchat.replay.chaos.kinds.resize import Resize

KINDS: tuple[Kind, ...] = (Pause(), ClockJump(), Resize(), FullDisk(), Load(), Clients())
