"""A span loaded from its own files alone runs as it does in the whole model; what is damaged or unsafe is refused."""

# B batch, T tokens, D model width

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from corolla.blocks import (
    GrowingKV,
    PackedRow,
    block_bytes,
    build_tiny,
    check_family,
    load_span,
    needed_edge_keys,
    needed_keys,
    split_model,
)
from corolla.blocks.products import FrozenLayer
from corolla.blocks.zoo import default_config
from corolla.errors import BadCheckpoint, UnsupportedModel, UsageError
from corolla.terms import Span

SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]
FAMILIES = ["llama", "mixtral", "gpt2", "bloom", "qwen3_moe", "gemma3_text", "deepseek_v3", "gpt_oss", "opt"]


def save(family, directory):
    """Save a tiny model in many files, and return it with the file of each of its tensors."""
    model = build_tiny(default_config(family))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size="20KB")
    return model, json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_span_needs_only_its_own_files_and_equals_the_whole_model(family, tmp_path):
    model, files = save(family, tmp_path)
    for span, expected in zip(SPANS, split_model(model, SPANS), strict=True):
        needed = {files[key] for key in needed_keys(model.config, span, files)}
        assert needed < set(files.values())
        folder = tmp_path / f"{span.start}"
        folder.mkdir()
        for name in {*needed, "config.json", "model.safetensors.index.json"}:
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        loaded = load_span(folder, span, dtype=torch.float32)
        assert (
            loaded.weight_bytes
            == expected.weight_bytes
            == sum(block_bytes(model.config, torch.float32)[span.start : span.stop])
        )
        hidden_BTD = torch.randn(2, 9, loaded.hidden_size)
        assert torch.equal(loaded(hidden_BTD)[0], expected(hidden_BTD)[0])


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss", "qwen3_next"])
@torch.no_grad()
def test_half_precision_is_that_of_the_whole_model(family, tmp_path):
    model, _ = save(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for span, expected in zip(SPANS, split_model(whole, SPANS), strict=True):
        loaded = load_span(tmp_path, span, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        kept = dict(expected.named_parameters())
        for name, weight in loaded.named_parameters():  # a lean span has the weights of its layers in another order
            assert weight.dtype == kept[name].dtype
        assert loaded.weight_bytes == expected.weight_bytes
        hidden_BTD = torch.randn(2, 9, loaded.hidden_size, dtype=torch.bfloat16)
        output_BTD, _ = loaded(hidden_BTD)
        assert output_BTD.dtype == torch.bfloat16
        assert torch.equal(output_BTD, expected(hidden_BTD)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_and_edges_need_each_tensor_once(family, tmp_path):
    model, files = save(family, tmp_path)
    needed = [needed_keys(model.config, span, files) for span in SPANS] + [needed_edge_keys(model.config, files)]
    assert sum(map(len, needed)) == len(set().union(*needed)) == len(files)


def test_a_model_in_a_single_file_loads_in_the_dtype_asked_for(tmp_path):
    model = build_tiny(default_config("llama"))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(tmp_path)
    span = load_span(tmp_path, Span(2, 4), dtype=torch.bfloat16)
    assert span.dtype == torch.bfloat16
    assert {weight.dtype for weight in span.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in span.parameters())
    assert span.is_packable


def test_progress_counts_the_tensors_of_the_span(tmp_path):
    model, files = save("llama", tmp_path)
    seen = []
    load_span(tmp_path, Span(1, 3), dtype=torch.float32, progress=lambda done, total: seen.append((done, total)))
    total = len(needed_keys(model.config, Span(1, 3), files))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_a_span_past_the_last_block_is_refused_with_the_number_of_blocks(tmp_path):
    save("llama", tmp_path)
    with pytest.raises(UsageError, match="the model has 4 blocks"):
        load_span(tmp_path, Span(2, 5), dtype=torch.float32)


def test_a_missing_file_is_named(tmp_path):
    model, files = save("llama", tmp_path)
    name = files["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / name).unlink()
    with pytest.raises(BadCheckpoint, match=name):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)


def test_a_missing_tensor_is_named(tmp_path):
    _, files = save("llama", tmp_path)
    del files["model.layers.1.mlp.up_proj.weight"]
    write_index(tmp_path, files)
    with pytest.raises(BadCheckpoint, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)


def test_a_missing_expert_is_refused(tmp_path):
    _, files = save("mixtral", tmp_path)
    gone = next(key for key in files if "layers.1" in key and "experts.2" in key)
    del files[gone]
    write_index(tmp_path, files)
    with pytest.raises(BadCheckpoint):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)


def test_a_damaged_file_is_refused(tmp_path):
    _, files = save("llama", tmp_path)
    damaged = tmp_path / files["model.layers.1.mlp.up_proj.weight"]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="download it again"):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)


def test_pickled_weights_are_refused(tmp_path):
    build_tiny(default_config("llama")).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BadCheckpoint, match="pickle"):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "pytorch_model.bin", "a\\b.safetensors"]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    _, files = save("llama", tmp_path)
    write_index(tmp_path, dict.fromkeys(files, name))
    with pytest.raises(BadCheckpoint, match="names files"):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_shape_is_refused(tmp_path, text):
    save("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match="not an index"):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


def test_quantized_weights_are_refused_by_name(tmp_path):
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="hqq"):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


def test_an_architecture_that_needs_code_of_its_own_is_refused(tmp_path):
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UnsupportedModel):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


def write_index(directory, files):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # those with experts are in test_experts.py
def test_a_quantised_span_differentiates_as_its_dequantised_self(family, quantization, tmp_path):
    save(family, tmp_path)
    span, seen = Span(1, 3), []
    loaded = load_span(tmp_path, span, dtype=quantization, progress=lambda *now: seen.append(now))
    assert seen[-1] == (2, 2)
    dense = load_span(tmp_path, span, dtype=torch.bfloat16, report=replace(check_family(loaded.config), is_lean=False))
    for name, layer in loaded.blocks.named_modules():
        if isinstance(layer, FrozenLayer):
            dense.blocks.get_submodule(name).weight.data = layer.dense()
    hidden_BTD = torch.randn(2, 9, loaded.hidden_size, dtype=torch.bfloat16)
    row_ND = hidden_BTD[0]

    def run(one):
        input_BTD = hidden_BTD.clone().requires_grad_()
        output_BTD, _ = one(input_BTD)
        output_BTD.square().sum().backward()
        with torch.inference_mode():
            packed_ND, _ = one.forward_packed(row_ND, [PackedRow(0, len(row_ND), GrowingKV())])
        return output_BTD, input_BTD.grad, packed_ND

    for _ in range(2):  # before and after inference
        *exact, packed_ND = run(loaded)
        *expected, dense_ND = run(dense)
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(exact, expected, strict=True))
        assert float((packed_ND - dense_ND).abs().max() / dense_ND.abs().max()) < 0.05
    config = loaded.config
    expected_bytes = sum(block_bytes(config, quantization)[1:3])
    assert loaded.weight_bytes == pytest.approx(expected_bytes, rel=0.05)  # scales weigh in a block as tiny as this
