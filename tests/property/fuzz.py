"""A fuzzer against whatever judges bytes of peers: they decode, or raise an error of the protocol, and nothing else.

Hypothesis does the same in each run of the tests, for a second; this is for hours. It needs atheris, which not every
Python has wheels for; its flags are those of libFuzzer.

    make fuzz FUZZ=-max_total_time=3600
"""

import sys
from contextlib import suppress

try:
    import atheris
except ImportError:
    sys.exit(
        f"atheris is not installed; try: pip install atheris. If there is none for Python {sys.version_info.major}."
        f"{sys.version_info.minor}, use the python of its newest wheels on pypi.org, or the tests of Hypothesis: "
        "pytest tests/property/test_wire.py --hypothesis-profile=long"
    )

with atheris.instrument_imports(include=["corolla"]):
    from corolla.codec import decode
    from corolla.errors import CodecError, FrameTooLarge, PeerOutdated, RemoteProtocolError
    from corolla.wire import FrameDecoder, Message, Output, SessionState, decode_message, encode_message, split_payload
    from corolla.wire.limits import PROTOCOL_VERSION

ALLOWED = (RemoteProtocolError, PeerOutdated, FrameTooLarge)


def try_stream(data):
    """Frames in pieces, their messages in the order of a session, and the tensors that come with them."""
    provider = atheris.FuzzedDataProvider(data)
    decoder, state = FrameDecoder(), SessionState("server" if provider.ConsumeBool() else "client")
    state_is_open = True
    if provider.ConsumeBool():
        list(decoder.receive(b"CRLA%c" % PROTOCOL_VERSION))
    while provider.remaining_bytes():
        for frame in decoder.receive(provider.ConsumeBytes(provider.ConsumeIntInRange(1, 200))):
            message = decode_message(frame.message)
            if state_is_open:
                try:
                    state.received(message)
                except RemoteProtocolError:
                    state_is_open = False
            if isinstance(message, Output):
                read_tensors(message, frame.payload)


def read_tensors(message, payload):
    with suppress(CodecError):
        parts = split_payload(payload, [meta.nbytes for meta in message.tensors])
        for meta, part in zip(message.tensors, parts, strict=True):
            decode(meta, part)


def try_message(data):
    """One message; what decodes can be said again."""
    assert isinstance(decode_message(encode_message(decode_message(data))), Message)


def try_one(data):
    with suppress(*ALLOWED):
        (try_stream if data[:1] < b"\x80" else try_message)(data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
