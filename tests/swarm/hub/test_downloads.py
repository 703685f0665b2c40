"""A model on the hub: only what is asked for crosses the network, and what arrives is what was promised."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.errors import BadCheckpoint, CapacityError, ModelError, ModelNotFound
from corolla.hub import HubConfig, open_repository
from corolla.hub.checkpoint import INDEX_FILE, SINGLE_FILE, read_index


class Hub:
    """A hub in another process."""

    def __init__(self, root):
        self.root, self.log = root / "served", root / "log"
        self.root.mkdir()
        self.log.touch()
        command = [sys.executable, Path(__file__).with_name("fake_hub.py"), self.root, self.log]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.endpoint = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def requests(self):
        """Take the requests since the last time, as (method, file or address)."""
        lines = self.log.read_text().split("\n")[:-1]
        self.log.write_text("")
        return {(method, path.rpartition("/")[2]) for method, path in (line.split(" ") for line in lines)}

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.stop()


@pytest.fixture
def config(hub, tmp_path):
    return HubConfig(cache_dir=tmp_path / "cache", endpoint=hub.endpoint)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes)).eval()


@pytest.fixture
def sharded(hub, model):
    model.save_pretrained(hub.root / "some" / "sharded", max_shard_size="40KB")
    (hub.root / "some" / "sharded" / "pytorch_model.bin").write_bytes(b"never fetched")
    (hub.root / "some" / "sharded" / "modeling.py").write_bytes(b"never fetched")
    return hub.root / "some" / "sharded"


def files_of_block(repository, block):
    return {file for name, file in repository.weight_map.items() if f"layers.{block}." in name}


def test_opening_downloads_no_weights(hub, sharded, config):
    repository = open_repository("some/sharded", config=config)
    assert not {name for _, name in hub.requests() if name.endswith((".safetensors", ".bin", ".py"))}
    assert len(repository.revision) == 40
    held = {path.name for path in repository.metadata_directory().iterdir()}
    assert held == {"config.json", "generation_config.json"}


def test_only_the_files_that_are_asked_for_are_downloaded_and_only_once(hub, sharded, config):
    repository = open_repository("some/sharded", config=config)
    wanted = files_of_block(repository, 2)
    assert 0 < len(wanted) < len(repository.manifest.files) / 2
    hub.requests()
    repository.fetch(wanted)
    assert {name for method, name in hub.requests() if method == "GET"} == wanted
    repository.fetch(wanted)
    assert not hub.requests()


def test_what_was_fetched_loads_with_transformers(sharded, model, config):
    repository = open_repository("some/sharded", config=config)
    wanted = files_of_block(repository, 2)
    view = repository.fetch(wanted)
    assert set(read_index(view / INDEX_FILE).values()) == wanted
    loaded = LlamaForCausalLM.from_pretrained(view, local_files_only=True).state_dict()
    there = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, loaded[name])]
    assert {name for name in there if "layers.2." in name} == {n for n in loaded if "layers.2." in n}


def test_a_local_copy_is_the_same_model(sharded, config):
    remote, local = (open_repository(name, config=config) for name in ("some/sharded", str(sharded)))
    assert remote.model_id == local.model_id


def test_one_file_of_all_weights_is_listed_without_downloading_it(hub, model, config):
    model.save_pretrained(hub.root / "some" / "single")
    repository = open_repository("some/single", config=config)
    assert repository.weight_map == dict.fromkeys(sorted(model.state_dict()), SINGLE_FILE)
    assert not list(config.downloads.rglob("*.safetensors"))
    with safe_open(repository.fetch([SINGLE_FILE]) / SINGLE_FILE, "pt") as weights:
        assert set(weights.keys()) == set(repository.weight_map)
    assert not list(repository.metadata_directory().glob("*.safetensors"))
    for memo in (config.cache_dir / "listings").glob("*.index.json"):
        memo.unlink()
    hub.requests()
    offline = HubConfig(cache_dir=config.cache_dir, endpoint=hub.endpoint, offline=True)
    assert open_repository("some/single", config=offline).weight_map == repository.weight_map
    assert not hub.requests()


def test_what_was_opened_once_opens_without_the_hub(hub, sharded, config, caplog):
    before = open_repository("some/sharded", config=config)
    before.fetch(files_of_block(before, 0))
    hub.stop()
    after = open_repository("some/sharded", config=config)
    assert after.model_id == before.model_id
    assert f"commit {before.revision}" in caplog.text
    assert after.fetch(files_of_block(after, 0)).is_dir()
    offline = HubConfig(cache_dir=config.cache_dir, endpoint=hub.endpoint, offline=True)
    with pytest.raises(ModelError, match="offline is set; go online once"):
        open_repository("some/sharded", config=offline).fetch(files_of_block(after, 3))


def test_a_pinned_commit_that_is_known_needs_no_request(hub, sharded, config):
    name = f"some/sharded@{open_repository('some/sharded', config=config).revision}"
    open_repository(name, config=config)
    hub.requests()
    open_repository(name, config=config)
    assert not hub.requests()


def test_weights_that_are_not_what_was_listed_are_deleted_and_refused(sharded, config):
    repository = open_repository("some/sharded", config=config)
    victim = sharded / min(files_of_block(repository, 1))
    honest = victim.read_bytes()
    tensors = load_file(victim)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, victim, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=f"{victim.name} .* is damaged.*deleted, so try again"):
        repository.fetch([victim.name])
    victim.write_bytes(honest)
    assert repository.fetch([victim.name]).is_dir()


def test_a_fetch_that_does_not_fit_is_refused_before_it_starts(hub, sharded, config):
    small = HubConfig(cache_dir=config.cache_dir, endpoint=hub.endpoint, max_disk_bytes=10_000)
    repository = open_repository("some/sharded", config=small)
    hub.requests()
    with pytest.raises(CapacityError, match="raise max_disk_bytes or serve fewer blocks"):
        repository.fetch(files_of_block(repository, 0))
    assert not hub.requests()


def test_what_made_room_for_others_is_downloaded_again(hub, sharded, config):
    repository = open_repository("some/sharded", config=config)
    wanted = files_of_block(repository, 0)
    for path in repository.fetch(wanted).glob("*.safetensors"):
        path.resolve().unlink()
    hub.requests()
    assert {path.name for path in repository.fetch(wanted).glob("*.safetensors") if path.is_file()} == wanted
    assert {name for method, name in hub.requests() if method == "GET"} == wanted


def test_what_other_programs_downloaded_is_used_and_never_deleted(hub, sharded, config, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "shared"))
    repository = open_repository("some/sharded", config=config)
    wanted = files_of_block(repository, 0)
    for name in wanted:
        hf_hub_download("some/sharded", name, revision=repository.revision, endpoint=hub.endpoint)
    hub.requests()
    view = repository.fetch(wanted)
    assert not hub.requests()
    victim = view / min(wanted)
    victim.write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match=f"is damaged.*; delete {tmp_path / 'shared'}"):
        repository.fetch(wanted)
    assert victim.read_bytes() == b"damaged"


def test_a_cache_that_cannot_be_written_is_named(hub, sharded, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CapacityError, match=f"{tmp_path / 'file'} cannot be used: .*set another cache_dir"):
        open_repository("some/sharded", config=HubConfig(cache_dir=tmp_path / "file", endpoint=hub.endpoint))


def test_refusals_name_the_remedy(hub, sharded, config):
    with pytest.raises(ModelNotFound, match="no model some/other, or it is private"):
        open_repository("some/other", config=config)
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        open_repository("some/sharded@v9", config=config)
    (sharded / "GATED").touch()
    with pytest.raises(ModelError, match="accept its terms"):
        open_repository("some/sharded", config=config)
    hub.stop()
    with pytest.raises(ModelError, match="check the network, or open a local copy"):
        open_repository("some/unseen", config=config)


def test_a_repository_of_pickled_weights_is_refused_and_not_downloaded(hub, config):
    (hub.root / "some" / "pickled").mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (hub.root / "some" / "pickled" / name).write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"pytorch_model.bin, a format that can run code"):
        open_repository("some/pickled", config=config)
    assert not {name for _, name in hub.requests() if name == "pytorch_model.bin"}


def test_an_index_that_names_a_missing_or_hostile_file_is_refused(sharded, config):
    min(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(BadCheckpoint, match="lacks model-00001"):
        open_repository("some/sharded", config=config)
    (sharded / INDEX_FILE).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(BadCheckpoint, match="same directory"):
        open_repository("some/sharded", config=HubConfig(cache_dir=config.cache_dir / "b", endpoint=config.endpoint))
