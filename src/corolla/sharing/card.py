"""What is said of an adapter by whoever made it, signed: its card. The hash of a card names the adapter.

Knows bytes, hashes and signatures; not where cards and files lie.
"""

import base64
import hashlib
import math
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, structs

from corolla.errors import BadAdapter
from corolla.swarm import Identity
from corolla.swarm.identity import verify
from corolla.terms import MODEL_ID_PATTERN, PEER_ID_PATTERN, ModelId, PeerId

__all__ = ["CARD_FILE", "MAX_CARD_BYTES", "Card", "FileEntry", "FileName", "Method"]

CARD_FILE: Final = "corolla_card.json"
MAX_CARD_BYTES: Final = 16 << 10
_PURPOSE: Final = b"corolla adapter card\n"

FileName = Literal["adapter_config.json", "adapter_model.safetensors"]
"""The files of an adapter; nothing else is ever read, sent or written, so no name can lead out of a directory."""

Method = Literal["lora", "prompt_tuning", "p_tuning", "prefix_tuning"]
"""How it was trained, as PEFT calls it, in small letters."""

_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Line = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
_Text = Annotated[str, Meta(max_length=4096)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file, as a card knows it."""

    sha256: _Sha256
    size_bytes: Annotated[int, Meta(gt=0, le=2**40)]


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said of an adapter.

    Args:
        name: What its author calls it.
        base: The weights that it is for.
        base_name: What its author calls these; for people only.
        base_revision: The commit that they came from; for people only.
        method: How it was trained.
        files: The files that it consists of.
        data: What it was trained on, in its author's words.
        metrics: What its author has measured, by name.
        licence: Under which it is given away, as an SPDX expression where there is one.
        parent: The id of the adapter that its training began with; ``None`` if it began with none.
        author: Who says all this.
        signature: Of all else, by the author, in base64.
        format: Which kind of card it is.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    base: Annotated[ModelId, Meta(pattern=MODEL_ID_PATTERN)]
    base_name: _Line
    base_revision: _Line | None
    method: Method
    files: dict[FileName, FileEntry]
    data: _Text
    metrics: Annotated[dict[_Line, float], Meta(max_length=64)]
    licence: _Line
    parent: _Sha256 | None
    author: Annotated[PeerId, Meta(pattern=PEER_ID_PATTERN)]
    signature: Annotated[str, Meta(max_length=128)] = ""
    format: Literal[1] = 1

    def sign(self, identity: Identity) -> "Card":
        """Make it its author's own.

        Args:
            identity: The author's.
        """
        mine = structs.replace(self, author=identity.peer_id, signature="")
        return structs.replace(mine, signature=base64.b64encode(identity.sign(_PURPOSE + mine.encode())).decode())

    def encode(self) -> bytes:
        """Write it in the one way in which it can be written."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def id(self) -> str:
        """What the adapter is called everywhere: the SHA-256 of its card, which holds those of its files."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def label(self) -> str:
        """Its name and the first letters of its id, by which servers announce it."""
        return f"{self.name}@{self.id[:12]}"

    @property
    def size_bytes(self) -> int:
        """How large its files are together."""
        return sum(one.size_bytes for one in self.files.values())

    def speaks_of(self, words: str) -> bool:
        """Say whether all words are somewhere in it."""
        said = f"{self.name} {self.id} {self.base_name} {self.method} {self.licence} {self.author} {self.data}".lower()
        return all(word in said for word in words.lower().split())

    @classmethod
    def read(cls, data: bytes) -> "Card":
        """Read a card from anywhere.

        Args:
            data: Its bytes.

        Raises:
            BadAdapter: If it is none, or not signed by the author that it names, or lacks a file.
        """
        if len(data) > MAX_CARD_BYTES:
            raise BadAdapter(f"a card of {len(data)} bytes came; they have {MAX_CARD_BYTES} at most")
        try:
            card = msgspec.json.decode(data, type=cls)
            signature = base64.b64decode(card.signature, validate=True)
            is_written_so = card.encode() == data
        except (ValueError, RecursionError, UnicodeError) as error:
            raise BadAdapter(f"{len(data)} bytes are no adapter's card: {error}") from error
        if not is_written_so or not all(math.isfinite(value) for value in card.metrics.values()):
            raise BadAdapter(f"the card of adapter {card.name!r} is not written as cards are; have it pushed again")
        if not card.signature:
            raise BadAdapter(f"the card of adapter {card.name!r} is not signed; corolla hub push signs it")
        signed = structs.replace(card, signature="").encode()
        if not verify(card.author, _PURPOSE + signed, signature):
            raise BadAdapter(
                f"the card of adapter {card.name!r} is forged: its signature is not that of its author "
                f"{card.author[:8]}; get it from elsewhere"
            )
        if set(card.files) != {"adapter_config.json", "adapter_model.safetensors"}:
            raise BadAdapter(f"the card of adapter {card.name!r} names {sorted(card.files)}; an adapter has two files")
        return card

    def check_file(self, name: FileName, size_bytes: int, sha256: str) -> None:
        """Check that a file is the one that was signed.

        Args:
            name: Which.
            size_bytes: Its size.
            sha256: Its hash.

        Raises:
            BadAdapter: If it is another one.
        """
        entry = self.files[name]
        if (size_bytes, sha256) != (entry.size_bytes, entry.sha256):
            raise BadAdapter(
                f"{name} of adapter {self.label} is damaged, or another file: it has {size_bytes} bytes and SHA-256 "
                f"{sha256[:12]}..., and {entry.size_bytes} and {entry.sha256[:12]}... were signed"
            )
