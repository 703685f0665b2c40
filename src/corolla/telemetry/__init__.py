"""What every room may tell about itself: events for people and timings for numbers.

Owns how an event is written. It must not know what any room does, decides nothing, and sets nothing up when imported.
"""

from corolla.telemetry.log import configure_logging, event, logger
from corolla.telemetry.timings import Timing, Timings

__all__ = ["Timing", "Timings", "configure_logging", "event", "logger"]
