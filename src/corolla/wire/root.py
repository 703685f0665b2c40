"""What all messages are made from."""

import msgspec

__all__ = ["Message"]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """The root of all messages; the class's name is its tag on the wire."""
