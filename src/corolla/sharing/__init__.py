"""Adapters that people share: their cards, the files that they consist of, and the stores in which they lie.

Nothing that comes from others is trusted: cards are signed, files are hashed, and only safetensors are read. It must
not know how adapters are computed with.
"""

from corolla.sharing.asking import fetch_adapter, put_adapter, search_adapters
from corolla.sharing.card import CARD_FILE, Card
from corolla.sharing.files import AdapterFiles, describe_files, open_files
from corolla.sharing.serving import ServedShelf
from corolla.sharing.shelf import Shelf, find_files, only_card
from corolla.sharing.stores import Store, bring_files, open_store

__all__ = [
    "CARD_FILE",
    "AdapterFiles",
    "Card",
    "ServedShelf",
    "Shelf",
    "Store",
    "bring_files",
    "describe_files",
    "fetch_adapter",
    "find_files",
    "only_card",
    "open_files",
    "open_store",
    "put_adapter",
    "search_adapters",
]
