"""Driving a chain: sessions, requests, retries, and transformers models whose blocks run in a swarm.

The core is asynchronous; :class:`Swarm` and the model classes are its blocking face.
"""

from corolla.client.blocks import RemoteBlocks
from corolla.client.config import ClientConfig
from corolla.client.directory import AsyncSwarm
from corolla.client.generation import GenerationSession
from corolla.client.model import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    RemoteModel,
    only_model,
)
from corolla.client.session import Session
from corolla.client.shelves import SwarmStore
from corolla.client.steps import HopTiming, Replay, StepResult, StepTokens
from corolla.client.sync import Swarm
from corolla.client.target import Target
from corolla.client.trace import Trace, TraceEntry

__all__ = [
    "AsyncSwarm",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "ClientConfig",
    "GenerationSession",
    "HopTiming",
    "RemoteBlocks",
    "RemoteModel",
    "Replay",
    "Session",
    "StepResult",
    "StepTokens",
    "Swarm",
    "SwarmStore",
    "Target",
    "Trace",
    "TraceEntry",
    "only_model",
]
