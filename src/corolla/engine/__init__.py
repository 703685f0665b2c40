"""Many users, one device: the scheduler, the compute thread, and how fast they are.

Blocks and pages meet here; neither knows the other. Knows nothing of peers, messages or bytes.
"""

from corolla.engine.config import EngineConfig
from corolla.engine.engine import Engine, Load
from corolla.engine.heap import give_back, kept_apart, share_heap
from corolla.engine.measure import free_bytes
from corolla.engine.work import Result, Sequences, SessionRows, WorkKind
from corolla.engine.worker import computing_threads

__all__ = [
    "Engine",
    "EngineConfig",
    "Load",
    "Result",
    "Sequences",
    "SessionRows",
    "WorkKind",
    "computing_threads",
    "free_bytes",
    "give_back",
    "kept_apart",
    "share_heap",
]
