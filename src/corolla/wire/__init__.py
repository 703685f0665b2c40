"""Bytes to messages and back, without input or output: frames, messages, limits, and the session's state table.

Remote bytes are judged here, once: any bytes either decode or raise an error of this room. Holds no clock, thread,
socket or dice, and no tensor: a payload is bytes until a codec reads it.
"""

from corolla.wire.frames import Buffer, Frame, FrameDecoder, encode_frame, split_payload
from corolla.wire.limits import PROTOCOL_VERSION
from corolla.wire.messages import (
    Ack,
    Backward,
    Closed,
    CloseSession,
    Failure,
    Forward,
    Gradients,
    Message,
    OpenSession,
    Output,
    Ping,
    Pong,
    Publish,
    Reconcile,
    Reconciled,
    Record,
    SessionOpened,
    Step,
    Subscribe,
    TensorMeta,
    Timing,
    decode_message,
    encode_message,
    expect,
)
from corolla.wire.states import SessionState

__all__ = [
    "PROTOCOL_VERSION",
    "Ack",
    "Backward",
    "Buffer",
    "CloseSession",
    "Closed",
    "Failure",
    "Forward",
    "Frame",
    "FrameDecoder",
    "Gradients",
    "Message",
    "OpenSession",
    "Output",
    "Ping",
    "Pong",
    "Publish",
    "Reconcile",
    "Reconciled",
    "Record",
    "SessionOpened",
    "SessionState",
    "Step",
    "Subscribe",
    "TensorMeta",
    "Timing",
    "decode_message",
    "encode_frame",
    "encode_message",
    "expect",
    "split_payload",
]
