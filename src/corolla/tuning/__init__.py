"""What trains on this side of a swarm: a plain loop that can be interrupted, and its checkpoints."""

from corolla.tuning.checkpoint import load_checkpoint, save_checkpoint
from corolla.tuning.training import Training, check_gradients

__all__ = ["Training", "check_gradients", "load_checkpoint", "save_checkpoint"]
