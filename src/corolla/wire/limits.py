"""The numbers that both sides of a stream agree on before they have said a word."""

PROTOCOL_VERSION = 5
"""Raised by any change that an older peer would misread; peers of different versions refuse each other by name."""

MAX_MESSAGE_BYTES = 1 << 20
"""The typed part of a frame. A directory of a thousand announcements fits."""

MAX_PAYLOAD_BYTES = 64 << 20
"""The tensor part of a frame: 2,048 tokens of a model 8,192 wide in float32 fit exactly; clients cut longer prompts."""

MAX_ROWS = 1024
"""Sequences in one session."""

MAX_STEP_TOKENS = 1 << 20
"""Tokens in one step over all rows; in practice the payload's limit is met first."""

MAX_TENSORS = 512
"""Tensors in one payload: the output of every block of the deepest models, when all are asked for."""

MAX_RECORDS = 2048
"""Announcements in one message."""

MAX_RECORD_BYTES = 4096
"""The body of one announcement."""

MAX_STAMP_BYTES = 512
"""What is signed of one announcement."""

RECORD_ID_BYTES = 8
"""The name of one stamp: the first bytes of its signature."""

MAX_IDS = 1 << 14
"""Stamps named in one list; a directory holds no more announcements."""

MAX_BUCKETS = 1024
"""Parts in which directories are compared."""

MAX_PROOF_BYTES = 512
"""A proof of membership in a private swarm; they have about 250."""

MAX_REVOKED_BYTES = 1 << 17
"""The list of a private swarm's revoked invites."""
