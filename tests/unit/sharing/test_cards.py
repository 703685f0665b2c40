"""Cards are believed only if their author has signed just what they say; files only if the card names their hashes."""

import base64
import json
import shutil

import msgspec
import pytest
from msgspec import structs

from corolla.errors import AdapterNotFound, BadAdapter, CapacityError, UsageError, WrongBase
from corolla.hub import open_repository
from corolla.sharing import CARD_FILE, Card, Shelf, open_files
from corolla.swarm import Identity


def test_a_card_is_read_as_it_was_written(card, author):
    read = Card.read(card.encode())
    assert read == card
    assert (read.author, read.method, read.metrics) == (author.peer_id, "lora", {"arrr": 0.5})
    assert read.label == f"pirate@{card.id[:12]}"


def lie(card, **changes):
    return structs.replace(card, **changes).encode()


def as_json(card, **changes):
    return json.dumps(msgspec.to_builtins(card) | changes).encode()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda card: lie(card, signature=""), "is not signed; corolla hub push signs it"),
        (lambda card: lie(card, base="cd" * 32), "is forged: its signature is not that of its author"),
        (lambda card: lie(card, metrics={"arrr": 0.99}), "is forged"),
        (lambda card: lie(card, author=Identity.generate().peer_id), "is forged"),
        (lambda card: lie(card, signature=base64.b64encode(bytes(64)).decode()), "is forged"),
        (lambda card: lie(card, signature="?"), "no adapter's card"),
        (lambda card: as_json(card, more=1), "no adapter's card: .*unknown field"),
        (lambda card: as_json(card, name="../../etc"), "no adapter's card"),
        (lambda card: as_json(card, files={"../passwd": {"sha256": "ab" * 32, "size_bytes": 1}}), "no adapter's card"),
        (lambda card: as_json(card, licence="\x1b[2J"), "no adapter's card"),
        (lambda card: as_json(card), "is not written as cards are"),
        (lambda card: b" " * (1 << 20), "they have 16384 at most"),
        (lambda card: b"[" * 9000, "no adapter's card"),
        (lambda card: b"\xff", "no adapter's card"),
    ],
)
def test_cards_that_lie_are_refused(card, make, words):
    with pytest.raises(BadAdapter, match=words):
        Card.read(make(card))


def test_a_card_names_both_files(card, author):
    with pytest.raises(BadAdapter, match="an adapter has two files"):
        Card.read(structs.replace(card, files={}).sign(author).encode())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_was_changed_is_refused(published, name):
    path = published.directory / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b" ")
    with pytest.raises(BadAdapter, match=rf"{name} of adapter pirate@\w+ is damaged, or another file|holds no adapter"):
        open_files(published.directory)


def test_a_card_that_names_another_method_is_refused(published, card, author):
    (published.directory / CARD_FILE).write_bytes(structs.replace(card, method="p_tuning").sign(author).encode())
    with pytest.raises(BadAdapter, match="says p_tuning, its files lora"):
        open_files(published.directory)


def test_a_wrong_base_is_refused_by_name(published, model, other_model, hub):
    right, wrong = (open_repository(str(one), config=hub) for one in (model, other_model))
    published.check_base(right.model_id, "whatever it is called", hub)
    with pytest.raises(WrongBase, match=rf"pirate@\w+ is for {model} \(\w+\), not for {other_model} \(\w+\)"):
        published.check_base(wrong.model_id, str(other_model), hub)


def test_plain_adapters_are_bound_by_the_name_that_was_noted_in_them(plain, model, other_model, hub, tmp_path):
    right, wrong = (open_repository(str(one), config=hub) for one in (model, other_model))
    files = open_files(plain)
    files.check_base(right.model_id, str(model), hub)
    files.check_base(right.model_id, "another name of the same weights", hub)
    with pytest.raises(WrongBase, match=f"is for {model} .* not for {other_model}"):
        files.check_base(wrong.model_id, str(other_model), hub)
    moved = shutil.copytree(plain, tmp_path / "moved")
    settings = json.loads((moved / "adapter_config.json").read_bytes())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(WrongBase, match="/gone, which is not on this disk.*corolla hub push .* --base smollm2"):
        open_files(moved).check_base(right.model_id, "smollm2", hub)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_mapping": {"parent_library": "os"}}, "sets auto_mapping, which would run or load"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"peft_type": "LOHA"}, "of method 'LOHA'; known are lora"),
        ({"peft_type": None}, "of method None"),
        ({"r": 10**9}, "1000000000; it must be 1 to 4096"),
        ({"r": "8"}, "'8'; it must be"),
        ({"rank_pattern": {"q_proj": 10**7}}, "it must be 1 to 4096"),
        ({"target_modules": ["q"] * 2000}, "more than 1024 target_modules"),
        ({"target_modules": 7}, "target_modules"),
        ({"base_model_name_or_path": "x" * 5000}, "names no model"),
        ({"padding": "x" * 70_000}, "is over 65536 bytes"),
    ],
)
def test_settings_that_reach_out_or_are_out_of_bounds_are_refused(plain, tmp_path, changes, words):
    copy = shutil.copytree(plain, tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_bytes())
    (copy / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(BadAdapter, match=words):
        open_files(copy)


def test_only_safetensors_are_read(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "copy")
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(BadAdapter, match=r"it has no adapter_model\.safetensors"):
        open_files(copy)
    (copy / "adapter_model.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(BadAdapter, match="is no safetensors file"):
        open_files(copy)


def test_a_shelf_finds_adapters_by_any_of_their_names(published, card, hub):
    shelf = Shelf(hub.adapters)
    for name in (card.id, card.id[:8], card.label, "pirate"):
        assert shelf.find(name) == card
    assert shelf.search("SEA mit") == shelf.search("", card.base) == [card]
    assert shelf.search("land") == shelf.search("", "cd" * 32) == []
    for name in (card.id[:7], "../pirate", "", "/"):
        with pytest.raises(AdapterNotFound):
            shelf.find(name)
    with pytest.raises(AdapterNotFound):
        shelf.open("../" + card.id)


def test_a_name_that_several_have_is_not_enough(published, plain, card, hub, author):
    shelf = Shelf(hub.adapters)
    shelf.put(open_files(plain), structs.replace(card, data="lies").sign(author))
    with pytest.raises(UsageError, match="2 adapters go by 'pirate'"):
        shelf.find("pirate")


def test_a_shelf_keeps_its_quota_and_leaves_no_drafts(plain, card, tmp_path):
    shelf = Shelf(tmp_path / "small", card.size_bytes - 1)
    with pytest.raises(CapacityError, match=rf"has {card.size_bytes} bytes; of the {card.size_bytes - 1} lent"):
        shelf.put(open_files(plain), card)
    shelf = Shelf(tmp_path / "small", card.size_bytes)
    shelf.put(open_files(plain), card)
    assert [path.name for path in shelf.directory.iterdir()] == [card.id]


def test_a_shelf_takes_nothing_but_what_was_signed(published, plain, card, author, tmp_path):
    entry = dict(card.files)["adapter_config.json"]
    files = dict.fromkeys(card.files, entry)
    shelf = Shelf(tmp_path / "other")
    with pytest.raises(BadAdapter, match="is damaged, or another file"):
        shelf.put(open_files(plain), structs.replace(card, files=files).sign(author))
    assert list(shelf.directory.iterdir()) == []


def test_what_was_swapped_on_the_shelf_is_not_served(published, plain, card, author, hub):
    other = structs.replace(card, data="lies").sign(author)
    (published.directory / CARD_FILE).write_bytes(other.encode())
    with pytest.raises(BadAdapter, match="holds another adapter than its name says"):
        Shelf(hub.adapters).open(card.id)
    assert list(Shelf(hub.adapters).cards()) == []
