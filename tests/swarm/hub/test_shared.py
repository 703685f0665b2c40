"""Adapters on shelves of servers and on a hub: found and fetched by hash; whoever hands out another one is left."""

import shutil

import pytest
import torch
from msgspec import structs

from corolla.client import AutoModelForCausalLM, ClientConfig, Swarm, SwarmStore
from corolla.errors import AdapterNotFound, CapacityError, UsageError
from corolla.hub import HubConfig, open_repository
from corolla.sharing import Shelf, describe_files, open_files
from corolla.swarm import Identity
from corolla.testing import ThreadedSwarm, save_tiny_adapter, save_tiny_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of PEFT, about itself
    for words in ("Found missing adapter keys", "`is_gradient_checkpointing` is deprecated")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def said(model, tmp_path_factory):
    """A directory with an adapter, and what the model in one piece says with it."""
    directory = tmp_path_factory.mktemp("adapters") / "pirate"
    tuned = save_tiny_adapter(directory, model, r=4, target_modules=["q_proj", "up_proj"])
    return directory, tuned.generate(input_ids=torch.arange(3, 12)[None], **GREEDY)


@pytest.fixture
def mine(tmp_path):
    return HubConfig(cache_dir=tmp_path / "mine")


@pytest.fixture
def published(said, model, mine):
    repository = open_repository(str(model), config=mine)
    about = {"name": "pirate", "data": "sea shanties", "metrics": {}, "licence": "MIT", "parent": None}
    card = describe_files(open_files(said[0]), repository, **about).sign(Identity.generate())
    return Shelf(mine.adapters).put(open_files(said[0]), card), card


@pytest.fixture
def servers(model, tmp_path):
    """Two servers, each with a shelf of its own."""
    hubs = [HubConfig(cache_dir=tmp_path / f"server{index}") for index in range(2)]
    swarm = ThreadedSwarm(str(model), ["0:4", "0:4"])
    swarm.hubs = hubs
    with swarm as servers:
        yield servers, [Shelf(hub.adapters) for hub in hubs]


def test_what_is_pushed_to_servers_is_found_fetched_and_used_by_its_hash(servers, published, said, model, tmp_path):
    swarm, shelves = servers
    files, card = published
    theirs = HubConfig(cache_dir=tmp_path / "theirs")
    with Swarm(swarm.address, config=ClientConfig(codec="raw")) as client:
        store = SwarmStore(client)
        assert store.search("", None) == []
        assert store.push(files, card) == card.id
        assert [shelf.holds(card.id) for shelf in shelves] == [True, True]
        assert store.push(files, card) == card.id
        assert store.search("shanties", card.base) == store.search(card.id[:12], None) == [card]
        assert store.search("nothing", None) == store.search("", "cd" * 32) == []
        with pytest.raises(AdapterNotFound, match="goes by 'nobody'"):
            store.pull("nobody", Shelf(theirs.adapters))
        remote = AutoModelForCausalLM.from_pretrained(str(model), swarm=client, adapter=card.id, hub=theirs)
        assert torch.equal(remote.generate(input_ids=torch.arange(3, 12)[None], **GREEDY), said[1])
    assert Shelf(theirs.adapters).open(card.id).card == card


def test_a_peer_that_hands_out_another_blob_is_left_for_an_honest_one(servers, published, tmp_path):
    swarm, shelves = servers
    files, card = published
    with Swarm(swarm.address, config=ClientConfig(codec="raw")) as client:
        store = SwarmStore(client)
        store.push(files, card)
        first = shelves[0].path_of(card.id, "adapter_model.safetensors")
        first.write_bytes(first.read_bytes()[:-4] + b"evil")
        theirs = Shelf(tmp_path / "theirs")
        assert store.pull(card.id, theirs).card == card
        second = shelves[1].path_of(card.id, "adapter_model.safetensors")
        second.write_bytes(second.read_bytes() * 2)
        other = structs.replace(card, data="lies").sign(Identity.generate())
        (shelves[0].path_of(card.id, None)).write_bytes(other.encode())
        shutil.rmtree(theirs.directory)
        with pytest.raises(AdapterNotFound):
            store.pull(card.id, theirs)
        assert list(theirs.directory.glob("*")) == []


def test_servers_take_only_what_is_for_their_model_and_fits_their_quota(servers, published, model, mine):
    swarm, shelves = servers
    files, card = published
    stranger = structs.replace(card, base="cd" * 32).sign(Identity.generate())
    with Swarm(swarm.address, config=ClientConfig(codec="raw")) as client:
        store = SwarmStore(client)
        with pytest.raises(UsageError, match="has no server of"):
            store.push(files, stranger)
        for shelf in shelves:
            shelf.directory.mkdir(parents=True, exist_ok=True)
        for thread in swarm.servers:
            thread.server._handler.adapters.shelf.quota_bytes = 100
        with pytest.raises(CapacityError, match=r"no server took .*of the 100 lent to adapters"):
            store.push(files, card)
    assert [list(shelf.directory.iterdir()) for shelf in shelves] == [[], []]
