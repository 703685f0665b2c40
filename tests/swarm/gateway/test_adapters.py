"""Adapters are models to whoever asks a gateway: listed, named in requests, and saying what PEFT says."""

import openai
import pytest
import transformers

from corolla.errors import UsageError, WrongBase
from corolla.testing import save_tiny_adapter

PROMPT = "Ahoy, said the"


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    """A directory with an adapter, and what the model in one piece says with it."""
    path = tmp_path_factory.mktemp("adapters") / "pirate"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = save_tiny_adapter(path, directory, r=4, target_modules=["q_proj", "up_proj"])
    ids_BT = tokenizer(PROMPT, return_tensors="pt").input_ids
    said_BT = model.generate(input_ids=ids_BT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return path, tokenizer.decode(said_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_a_model_of_its_own_name(directory, servers, adapter, gateway_over, tmp_path):
    path, expected = adapter
    with gateway_over(servers, str(directory), tmp_path / "keys.sqlite", adapters=(str(path),)) as running:
        name = f"{directory}:pirate"
        with running.client() as client:
            listed = {model.id: model.corolla["adapter"] for model in client.models.list()}
            assert listed == {str(directory): None, name: "pirate"}
            ask = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            plain = client.completions.create(model=str(directory), **ask).choices[0].text
            said = client.completions.create(model=name, **ask).choices[0].text
            assert said == expected != plain
            assert client.completions.create(model=str(directory), **ask).choices[0].text == plain
            vectors = [
                client.embeddings.create(model=one, input="Ahoy", encoding_format="float").data[0].embedding
                for one in (str(directory), name)
            ]
            assert vectors[0] != vectors[1]
            with pytest.raises(openai.NotFoundError, match="pirat' is not offered here; there are: .*:pirate") as error:
                client.completions.create(model=name[:-1], **ask)
            assert error.value.body["code"] == "model_not_found"


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_that_cannot_be_offered_are_refused_by_name(directory, servers, adapter, gateway_over, tmp_path):
    path, _ = adapter
    settings = (path / "adapter_config.json").read_text()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "adapter_config.json").write_text(settings.replace(str(directory), "/elsewhere"))
    (wrong / "adapter_model.safetensors").write_bytes((path / "adapter_model.safetensors").read_bytes())
    for adapters, error, words in (
        ([str(wrong)], WrongBase, "is for /elsewhere"),
        ([str(path)] * 2, UsageError, "two adapters would have the same name"),
    ):
        gateway = gateway_over(servers, str(directory), tmp_path / "keys.sqlite", adapters=tuple(adapters))
        try:
            with pytest.raises(error, match=words):
                gateway.__enter__()
        finally:
            gateway._swarm.close()
            gateway._accounts.close()
