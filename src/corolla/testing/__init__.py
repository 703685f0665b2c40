"""What tests of Corolla and of programs on top of it need: tiny models, servers as processes, a network in memory.

All of it is real: the models are transformers', the servers are ``corolla serve``, and the memory transport passes
the same tests as the others.
"""

from corolla.swarm.transports.memory import MemoryNetwork, MemoryTransport
from corolla.testing.chaos import Chaos, ChaosPlan, ChaosReport
from corolla.testing.counting import CountingTransport
from corolla.testing.gossip import SimulatedServer, SimulatedSwarm
from corolla.testing.models import FAMILIES, save_tiny_adapter, save_tiny_model
from corolla.testing.processes import LocalSwarm, ServerProcess
from corolla.testing.sizes import Growth, Size, Sizes
from corolla.testing.threads import ServerThread, ThreadedSwarm

__all__ = [
    "FAMILIES",
    "Chaos",
    "ChaosPlan",
    "ChaosReport",
    "CountingTransport",
    "Growth",
    "LocalSwarm",
    "MemoryNetwork",
    "MemoryTransport",
    "ServerProcess",
    "ServerThread",
    "SimulatedServer",
    "SimulatedSwarm",
    "Size",
    "Sizes",
    "ThreadedSwarm",
    "save_tiny_adapter",
    "save_tiny_model",
]
