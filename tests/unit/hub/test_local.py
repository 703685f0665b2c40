"""A model in a directory: what it is, and what is refused."""

import json
import shutil
import struct

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from corolla.blocks import load_config
from corolla.errors import BadCheckpoint, ModelNotFound, UnsupportedModel, UsageError
from corolla.hub import HubConfig, Manifest, load_tokenizer, open_repository
from corolla.hub.checkpoint import INDEX_FILE, SINGLE_FILE


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_weight_map_names_every_tensor_and_the_file_that_holds_it(sharded, tiny_model, config):
    repository = open_repository(str(sharded), config=config)
    assert set(repository.weight_map) == set(tiny_model.state_dict())
    assert set(repository.weight_map.values()) == {path.name for path in sharded.glob("*.safetensors")}
    assert len(repository.manifest.files) > 3


def test_what_is_fetched_loads_into_the_same_model(sharded, single, tiny_model, config):
    for directory in (sharded, single):
        repository = open_repository(str(directory), config=config)
        fetched = repository.fetch(repository.weight_map.values())
        loaded = AutoModelForCausalLM.from_pretrained(fetched).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in tiny_model.state_dict().items())


def test_the_same_files_in_two_places_are_the_same_model(sharded, tmp_path, config):
    shutil.copytree(sharded, tmp_path / "copy")
    first, second = (open_repository(str(path), config=config) for path in (sharded, tmp_path / "copy"))
    assert first.model_id == second.model_id
    assert first.name != second.name


def test_keys_that_change_with_the_writer_are_no_part_of_a_model(sharded, config):
    before = open_repository(str(sharded), config=config).model_id
    change_json(sharded / "config.json", transformers_version="9.9", _name_or_path="elsewhere", dtype="float16")
    assert open_repository(str(sharded), config=config).model_id == before


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 0.5}, {"num_hidden_layers": 3}])
def test_another_architecture_is_another_model(sharded, config, changes):
    before = open_repository(str(sharded), config=config).model_id
    change_json(sharded / "config.json", **changes)
    assert open_repository(str(sharded), config=config).model_id != before


def test_another_vocabulary_is_another_model_but_another_chat_template_is_not(sharded, config):
    before = open_repository(str(sharded), config=config).model_id
    (sharded / "chat_template.jinja").write_text("{{ messages }}")
    assert open_repository(str(sharded), config=config).model_id == before
    (sharded / "vocab.txt").write_text("a b c")
    assert open_repository(str(sharded), config=config).model_id != before


def test_one_changed_byte_of_the_weights_is_another_model(single, config):
    before = open_repository(str(single), config=config).model_id
    with (single / SINGLE_FILE).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert open_repository(str(single), config=config).model_id != before


def test_the_id_is_stable_for_ever():
    manifest = Manifest(config='{"model_type":"llama"}', tokenizer_sha256="ab", files={"b": "2", "a": "1"})
    assert manifest.model_id == "819a174514a1aca3db34244dbbbeba54c2c30f35c58b3e29983c6a32679a0af5"
    turned = Manifest(config='{"model_type":"llama"}', tokenizer_sha256="ab", files={"a": "1", "b": "2"}, revision="x")
    assert turned.model_id == manifest.model_id
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest


def test_weights_are_hashed_once(sharded, config):
    seen = []
    report = lambda *progress: seen.append(progress)  # noqa: E731
    open_repository(str(sharded), config=config, report=report)
    assert {label for label, *_ in seen} == {f"Hashing {path.name}" for path in sharded.glob("*.safetensors")}
    assert all(done == total for _, done, total, _ in seen)
    seen.clear()
    open_repository(str(sharded), config=config, report=report)
    assert not seen


def test_a_file_that_is_none_of_the_models_cannot_be_fetched(sharded, config):
    with pytest.raises(UsageError, match="'other.safetensors'"):
        open_repository(str(sharded), config=config).fetch(["other.safetensors"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_with_the_way_out(single, config, name):
    """Petals defect K: weight files were unpickled, which runs what they hold."""
    (single / SINGLE_FILE).rename(single / name)
    with pytest.raises(BadCheckpoint, match=rf"{name}, a format that can run code .*save_pretrained"):
        open_repository(str(single), config=config)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.gguf", "consolidated.safetensors"])
def test_weights_of_another_kind_are_refused_with_the_way_out(single, config, name):
    (single / SINGLE_FILE).rename(single / name)
    with pytest.raises(BadCheckpoint, match=f"{name} but neither .*save_pretrained"):
        open_repository(str(single), config=config)


def test_a_gguf_file_is_refused_with_a_command_that_converts_it(single, config):
    (single / SINGLE_FILE).rename(single / "model.gguf")
    with pytest.raises(BadCheckpoint, match=r"gguf_file='model\.gguf', .*GgufConfig\(dequantize=True\)"):
        open_repository(str(single), config=config)


def test_pickled_files_beside_safetensors_do_no_harm(single, config):
    (single / "training_args.bin").write_bytes(b"never read")
    assert open_repository(str(single), config=config).weight_map


def test_a_directory_without_weights_and_an_adapter_are_refused(single, config):
    (single / SINGLE_FILE).unlink()
    with pytest.raises(BadCheckpoint, match="has no weights"):
        open_repository(str(single), config=config)
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="is an adapter"):
        open_repository(str(single), config=config)


HEADERS = {
    "empty": b"",
    "too short": b"\1\0\0",
    "longer than the file": struct.pack("<Q", 1000) + b"{}",
    "absurdly long": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"oops",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "too deep": struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    "no offsets": struct.pack("<Q", 30) + b'{"a":{"dtype":"F32","shape":[]' + b"}}",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_malformed_header_is_refused_and_names_the_file(single, config, content):
    (single / SINGLE_FILE).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=SINGLE_FILE):
        open_repository(str(single), config=config)


@pytest.mark.parametrize("offsets", [[0, 5], [-4, 0], [4, 0]])
def test_offsets_outside_of_the_file_are_refused(single, config, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (single / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(BadCheckpoint, match="tensor a lies at"):
        open_repository(str(single), config=config)


def test_a_truncated_file_is_refused(sharded, config):
    victim = min(sharded.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=f"{victim.name} is cut off"):
        open_repository(str(sharded), config=config)


def test_an_index_that_names_a_missing_file_is_refused(sharded, config):
    victim = min(sharded.glob("*.safetensors"))
    victim.unlink()
    with pytest.raises(BadCheckpoint, match=f"lacks {victim.name}"):
        open_repository(str(sharded), config=config)


def test_an_index_that_expects_a_tensor_where_it_is_not_is_refused(sharded, config):
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    change_json(sharded / INDEX_FILE, weight_map=weight_map | {"extra": min(weight_map.values())})
    with pytest.raises(BadCheckpoint, match="lacks 1 tensors .* extra"):
        open_repository(str(sharded), config=config)


HOSTILE = [
    "../other/model.safetensors",
    "/etc/model.safetensors",
    "..\\model.safetensors",
    "C:model.safetensors",
    "model.bin",
    ".safetensors",
    "a\0.safetensors",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_reaches_outside_of_its_directory_is_refused(sharded, config, name):
    change_json(sharded / INDEX_FILE, weight_map={"weight": name})
    with pytest.raises(BadCheckpoint, match="only .safetensors files in the same directory"):
        open_repository(str(sharded), config=config)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_malformed_index_is_refused(sharded, config, content):
    (sharded / INDEX_FILE).write_text(content)
    with pytest.raises(BadCheckpoint, match=INDEX_FILE):
        open_repository(str(sharded), config=config)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 7}', "[" * 100_000, "\xff"])
def test_a_malformed_config_is_refused(single, config, content):
    (single / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        open_repository(str(single), config=config)


def test_a_missing_config_is_refused(single, config):
    (single / "config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"config\.json cannot be read: No such file"):
        open_repository(str(single), config=config)


def test_a_config_that_redirects_the_weights_is_refused(single, config):
    change_json(single / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(BadCheckpoint, match="redirects the weights"):
        open_repository(str(single), config=config)


def test_a_config_may_hold_infinity(single, config):
    change_json(single / "config.json", time_step_limit=[0.0, float("inf")])
    assert open_repository(str(single), config=config).model_id


def test_the_configuration_is_loaded(single, config):
    assert load_config(open_repository(str(single), config=config).metadata_directory()).num_hidden_layers == 4


def test_an_unknown_architecture_is_named_and_its_code_never_run(single, config):
    (single / "code.py").write_text("raise SystemExit('run')")
    change_json(single / "config.json", model_type="novel", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(UnsupportedModel, match="'novel'.*its own code, which is never run"):
        load_config(open_repository(str(single), config=config).metadata_directory())


def test_a_configuration_with_impossible_values_is_refused(single, config):
    change_json(single / "config.json", hidden_size="wide")
    with pytest.raises(BadCheckpoint, match="malformed"):
        load_config(open_repository(str(single), config=config).metadata_directory())


def test_a_model_without_tokenizer_says_so(single, config):
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        load_tokenizer(open_repository(str(single), config=config))


def test_an_unknown_name_comes_with_near_misses(sharded, config):
    with pytest.raises(ModelNotFound, match="did you mean smollm2?"):
        open_repository("smolm2", config=config)
    with pytest.raises(ModelNotFound, match="did you mean sharded?"):
        open_repository(str(sharded) + "s", config=config)


def test_a_name_never_means_a_place_outside_of_the_hub(config):
    for name in ("../x", "a/b/c", "a/b@", "a b/c", "-a/b", "", "\0", "~nobody/x/y"):
        with pytest.raises(ModelNotFound):
            open_repository(name, config=config)


def test_the_default_cache_is_the_users():
    assert HubConfig().cache_dir.name in ("corolla", "Cache")
