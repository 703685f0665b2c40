"""What a sender keeps of what it sent, as the bytes that travelled, and the steps that rebuild a hop's keys and values.

Owns the kept bytes, in memory and beyond a limit in files. Knows no peer, no stream and no chain.
"""

from corolla.replay.log import Log, Trail, replay_tokens
from corolla.replay.store import Sent, Store

__all__ = ["Log", "Sent", "Store", "Trail", "replay_tokens"]
