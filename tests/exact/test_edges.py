"""The client's part of a model with all blocks behind one call is, to everything that uses it, the whole model."""

# B batch, T tokens, D model width

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from corolla.blocks import build_tiny, decoder_of, load_edges, needed_edge_keys, split_model
from corolla.blocks.loading import checkpoint_files
from corolla.blocks.zoo import default_config
from corolla.errors import BadCheckpoint

FAMILIES = ["llama", "mixtral", "gpt2", "bloom", "gemma3_text", "opt", "falcon", "cohere2", "phi3", "glm_moe_dsa"]


class LocalBlocks(nn.Module):
    """All blocks on this machine, in three spans: in place of a swarm."""

    def __init__(self, model):
        super().__init__()
        self.spans = split_model(model)
        self.calls = 0

    def forward(self, hidden_BTD, *args, position_ids=None, **kwargs):
        self.calls += 1
        taps = {}
        for span in self.spans:
            hidden_BTD, tapped = span(hidden_BTD, position_ids_BT=position_ids, taps=range(4))
            taps |= tapped
        return hidden_BTD, taps


def make(family, directory, **options):
    model = build_tiny(default_config(family))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size="20KB")
    blocks = LocalBlocks(model)
    return model, blocks, load_edges(directory, remote=lambda config: blocks, dtype=torch.float32, **options)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_whole_model(family, tmp_path):
    model, blocks, edges = make(family, tmp_path)
    ids_BT = torch.randint(3, 128, (2, 9))
    expected = model(ids_BT, output_hidden_states=True, use_cache=False)
    actual = edges(ids_BT, output_hidden_states=True, use_cache=False)
    assert blocks.calls == 1
    assert torch.equal(actual.logits, expected.logits)
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_generation_gives_the_tokens_of_the_whole_model(family, tmp_path):
    model, _, edges = make(family, tmp_path)
    ids_BT = torch.randint(3, 128, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(edges.generate(ids_BT, **options), model.generate(ids_BT, **options))


def test_gradients_reach_the_embeddings_through_the_blocks(tmp_path):
    model, _, edges = make("llama", tmp_path)
    ids_BT = torch.randint(3, 128, (2, 9))
    for whole in (model, edges):
        whole(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    expected = model.get_input_embeddings().weight.grad
    assert torch.equal(edges.get_input_embeddings().weight.grad, expected)


def test_the_model_is_of_the_class_of_transformers_with_the_mixin_first(tmp_path):
    class Mixin:
        def greet(self):
            return "hello"

    model, _, edges = make("llama", tmp_path, mixin=Mixin)
    assert isinstance(edges, type(model))
    assert type(edges).__name__ == type(model).__name__
    assert type(edges).__mro__[1] is Mixin
    assert edges.greet() == "hello"
    assert not edges.training


def test_only_the_edges_have_parameters(tmp_path):
    model, _, edges = make("llama", tmp_path)
    own = {name for name, _ in edges.named_parameters() if "spans" not in name and "remote" not in name}
    assert own == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(decoder_of(edges).layers) == 4


def test_only_the_files_of_the_edges_are_needed(tmp_path):
    model, blocks, _ = make("llama", tmp_path)
    files = checkpoint_files(tmp_path)
    needed = {files[key] for key in needed_edge_keys(model.config, files)}
    for name in set(files.values()) - needed:
        (tmp_path / name).unlink()
    assert load_edges(tmp_path, remote=lambda config: blocks, dtype=torch.float32)
    (tmp_path / files["lm_head.weight"]).unlink()
    with pytest.raises(BadCheckpoint):
        load_edges(tmp_path, remote=lambda config: blocks, dtype=torch.float32)


def test_tied_heads_stay_tied(tmp_path):
    _, _, edges = make("gpt2", tmp_path)
    assert edges.get_output_embeddings().weight is edges.get_input_embeddings().weight


def test_a_classifier_has_a_fresh_head_that_learns(tmp_path):
    _, _, edges = make("llama", tmp_path, auto_class=AutoModelForSequenceClassification)
    ids_BT = torch.randint(3, 128, (1, 9))
    edges(ids_BT, labels=torch.tensor([1]), use_cache=False).loss.backward()
    assert edges.score.weight.requires_grad
    assert edges.score.weight.grad.abs().sum() > 0


def test_generation_settings_of_the_checkpoint_are_kept(tmp_path):
    model = build_tiny(default_config("llama"))
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    transformers_logging.disable_progress_bar()
    model.save_pretrained(tmp_path)
    edges = load_edges(tmp_path, remote=lambda config: nn.Identity(), dtype=torch.float32)
    assert edges.generation_config.temperature == 0.25
