"""Model repository to manifest, configuration, tokenizer and the files of a span, kept on disk.

Neither knows blocks nor runs them: which tensors a span needs is its caller's to say. Never unpickles anything, and
never runs code that comes with a model.
"""

from corolla.hub.config import HubConfig
from corolla.hub.manifest import Manifest
from corolla.hub.progress import Progress, Unit, stay_silent
from corolla.hub.repository import Repository, load_tokenizer, open_repository
from corolla.hub.rounded import RoundedWeights

__all__ = [
    "HubConfig",
    "Manifest",
    "Progress",
    "Repository",
    "RoundedWeights",
    "Unit",
    "load_tokenizer",
    "open_repository",
    "stay_silent",
]
