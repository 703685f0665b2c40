"""Checkpoints that others have quantised: a span is that of the dequantised model exactly, or it is refused."""

# I inputs, O outputs, G groups of inputs

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from corolla.blocks import (
    GrowingKV,
    PackedRow,
    block_bytes,
    build_tiny,
    check_family,
    load_config,
    load_edges,
    load_span,
    needed_edge_keys,
    needed_keys,
    split_model,
)
from corolla.blocks.zoo import default_config
from corolla.client import AutoModelForCausalLM as RemoteCausalLM
from corolla.client import ClientConfig, Swarm
from corolla.errors import BadCheckpoint, UnsupportedModel
from corolla.terms import Span
from corolla.testing import ThreadedSwarm, save_tiny_model

SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]
GROUP = 32
RAW = ClientConfig(codec="raw")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def is_linear(name, tensor):
    return name.endswith("_proj.weight") and ".layers." in name and tensor.dim() == 2


def make(directory, family, method, pack, settings):
    """Write a tiny model whose linear layers ``pack`` has taken apart; give what each of them means."""
    transformers_logging.disable_progress_bar()
    build_tiny(default_config(family)).save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors, meant = load_file(path), {}
    for name, tensor in list(tensors.items()):
        if is_linear(name, tensor):
            parts, meant[name] = pack(tensors.pop(name))
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (directory / "config.json").write_text(json.dumps(config))
    return meant


def pack_fp8(weight_OI):
    rows, columns = weight_OI.shape
    blocks = weight_OI.view(rows // 16, 16, columns // 16, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    rounded = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (rounded.float() * scale[:, None, :, None]).reshape(rows, columns)
    return {"weight": rounded.view(rows, columns), "weight_scale_inv": scale}, meant


def round_in_groups(weight_OI, *, is_symmetric):
    """Round to four bits with a scale and a zero point for each group of inputs; the numbers are 0 to 15."""
    groups = weight_OI.view(len(weight_OI), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    if is_symmetric:
        scale = groups.abs().amax(-1) / 7
        zero = torch.full_like(scale, 8)
    else:
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(1, 15)
    scale = scale.half()
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = ((numbers - zero[..., None]).half() * scale[..., None]).float().view_as(weight_OI)
    return numbers.view_as(weight_OI).int(), zero.int(), scale, meant


def words(numbers, axis):
    """Put eight numbers into each word, the first into the lowest bits."""
    numbers = numbers.transpose(axis, -1)
    packed = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // 8, dtype=torch.int64)
    for place in range(8):
        packed |= numbers[..., place::8].long() << (4 * place)
    return packed.to(torch.int32).transpose(axis, -1)


def pack_gptq(weight_OI, *, shuffled=False):
    numbers_OI, zero_OG, scale_OG, meant_OI = round_in_groups(weight_OI, is_symmetric=False)
    group_I = torch.arange(weight_OI.shape[1]) // GROUP
    if shuffled:  # as "act order" has it: which inputs share a scale is written down
        order = torch.randperm(len(group_I), generator=torch.Generator().manual_seed(0))
        numbers_OI, meant_OI, group_I = numbers_OI[:, order], meant_OI[:, order], group_I[order]
    parts = {
        "qweight": words(numbers_OI.T.contiguous(), 0),
        "qzeros": words(zero_OG.T.contiguous() - 1, 1),
        "scales": scale_OG.T,
        "g_idx": group_I.int(),
    }
    return parts, meant_OI


def pack_awq(weight_OI):
    numbers_OI, zero_OG, scale_OG, meant_OI = round_in_groups(weight_OI, is_symmetric=False)

    def interleave(numbers):
        return numbers.view(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(numbers), -1)

    parts = {
        "qweight": words(interleave(numbers_OI.T.contiguous()), 1),
        "qzeros": words(interleave(zero_OG.T.contiguous()), 1),
        "scales": scale_OG.T,
    }
    return parts, meant_OI


def pack_compressed(weight_OI):
    numbers_OI, _, scale_OG, meant_OI = round_in_groups(weight_OI, is_symmetric=True)
    parts = {
        "weight_packed": words(numbers_OI, 1),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    return parts, meant_OI


def pack_int8(weight_OI):
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    rounded_OI = (weight_OI / scale_O1).round()
    return {"weight": rounded_OI.to(torch.int8), "weight_scale": scale_O1}, rounded_OI * scale_O1


def scheme(form, **weights):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


GPTQ = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
AWQ = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
COMPRESSED = scheme("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)
INT8 = scheme("int-quantized", num_bits=8, type="int", strategy="channel")
FORMATS = {
    "fp8": ("llama", "fp8", pack_fp8, {"activation_scheme": "dynamic", "weight_block_size": [16, 16]}),
    "fp8, experts": ("qwen3_moe", "fp8", pack_fp8, {"activation_scheme": "dynamic", "weight_block_size": [16, 16]}),
    "gptq": ("llama", "gptq", pack_gptq, GPTQ),
    "gptq, act order": ("llama", "gptq", lambda weight: pack_gptq(weight, shuffled=True), GPTQ),
    "gptq, experts": ("qwen3_moe", "gptq", pack_gptq, GPTQ),
    "awq": ("llama", "awq", pack_awq, AWQ),
    "compressed-tensors, int4": ("llama", "compressed-tensors", pack_compressed, COMPRESSED),
    "compressed-tensors, int8": ("llama", "compressed-tensors", pack_int8, INT8),
}


@pytest.fixture(autouse=True)
def quiet():
    """Keep transformers, which tells of tensors that a pruned class has no place for, from doing so."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    yield
    transformers_logging.set_verbosity(level)


def needs(method):
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def read_whole(directory):
    """Let transformers read and dequantise all of a checkpoint."""
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config["dequantize"] = True
    whole = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.bfloat16)
    for weight in whole.parameters():  # it leaves those that were not quantised as they are stored
        weight.data = weight.data.bfloat16()
    return whole


def assert_same(loaded, expected):
    """Hold outputs and gradients against each other, before and after inference."""
    hidden_BTD = torch.randn(2, 9, loaded.hidden_size, dtype=loaded.dtype)

    def run(span):
        input_BTD = hidden_BTD.clone().requires_grad_()
        output_BTD, _ = span(input_BTD)
        output_BTD.square().sum().backward()
        return output_BTD, input_BTD.grad

    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(run(loaded), run(expected), strict=True))
        with torch.inference_mode():
            row_ND = hidden_BTD[0]
            loaded.forward_packed(row_ND, [PackedRow(0, len(row_ND), GrowingKV())])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FORMATS), ("fp8", torch.float32), ("gptq", torch.float32)],
)
def test_a_span_is_that_of_the_dequantised_model(name, dtype, tmp_path):
    family, method, pack, settings = FORMATS[name]
    needs(method)
    meant = make(tmp_path, family, method, pack, settings)
    reference = build_tiny(default_config(family))
    reference.save_pretrained(plain := tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors") | {name: weight.contiguous() for name, weight in meant.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    report = check_family(whole.config)
    for span, expected in zip(SPANS, split_model(whole, SPANS), strict=True):
        loaded = load_span(tmp_path, span, dtype=dtype, report=report)
        assert loaded.weight_bytes == sum(block_bytes(loaded.config, dtype)[span.start : span.stop])
        assert_same(loaded, expected)


@pytest.mark.parametrize("name", ["fp8", "fp8, experts", "compressed-tensors, int4", "compressed-tensors, int8"])
def test_a_span_is_what_transformers_makes_of_the_checkpoint(name, tmp_path):
    family, method, pack, settings = FORMATS[name]
    needs(method)
    make(tmp_path, family, method, pack, settings)
    whole = read_whole(tmp_path)
    assert_same(load_span(tmp_path, Span(1, 3), dtype=torch.bfloat16), split_model(whole, SPANS)[1])


def test_experts_in_mxfp4_are_what_their_numbers_mean(tmp_path):
    transformers_logging.disable_progress_bar()
    build_tiny(default_config("gpt_oss")).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    meant = {}
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
        numbers = levels[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
        meant[name] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    span = load_span(tmp_path, Span(1, 3), dtype=torch.bfloat16)
    for index, block in zip(span.span.indices, span.blocks, strict=True):
        expected = meant[f"model.layers.{index}.mlp.experts.gate_up_proj"].bfloat16()
        assert torch.equal(block.mlp.experts.gate_up_proj, expected)
    assert_same(span, split_model(read_whole(tmp_path), SPANS)[1])


def test_awq_is_what_another_reader_makes_of_it():
    converters = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    parts, meant_OI = pack_awq(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    other = converters.AutoAWQConverter(group_size=GROUP).process(
        {f"layer.{name}": part for name, part in parts.items()}
    )
    numbers_OI = unpack_from_int32(other["layer.weight_packed"], 4, torch.Size((64, 96)))
    zeros_OG = unpack_from_int32(other["layer.weight_zero_point"], 4, torch.Size((64, 96 // GROUP)), packed_dim=0)
    offsets_OI = numbers_OI - zeros_OG.repeat_interleave(GROUP, 1)
    assert torch.equal((offsets_OI.half() * other["layer.weight_scale"].repeat_interleave(GROUP, 1)).float(), meant_OI)


@pytest.mark.parametrize("name", ["fp8", "gptq", "compressed-tensors, int4"])
def test_spans_and_edges_need_each_tensor_once(name, tmp_path):
    family, method, pack, settings = FORMATS[name]
    needs(method)
    make(tmp_path, family, method, pack, settings)
    keys, config = set(load_file(tmp_path / "model.safetensors")), load_config(tmp_path)
    needed = [needed_keys(config, span, keys) for span in SPANS] + [needed_edge_keys(config, keys)]
    assert sum(map(len, needed)) == len(set().union(*needed)) == len(keys)


@pytest.mark.parametrize("name", ["fp8", "awq"])
def test_the_edges_of_a_quantised_model_are_plain(name, tmp_path):
    family, method, pack, settings = FORMATS[name]
    make(tmp_path, family, method, pack, settings)
    edges = load_edges(tmp_path, remote=lambda config: torch.nn.Identity(), dtype=torch.float32)
    assert not getattr(edges, "is_quantized", False)
    assert not hasattr(edges.config, "quantization_config")


def test_a_swarm_gives_the_tokens_of_the_dequantised_model(tmp_path):
    family, method, pack, settings = FORMATS["gptq"]
    save_tiny_model(tmp_path, family=family, shard_bytes=1 << 30)  # with a tokenizer
    make(tmp_path, family, method, pack, settings)
    with ThreadedSwarm(str(tmp_path), ["0:2", "2:4"]) as servers, Swarm(servers.address, config=RAW) as swarm:
        remote = RemoteCausalLM.from_pretrained(str(tmp_path), swarm=swarm)
        ids_BT = torch.arange(5, 15)[None]
        tokens_BT = remote.generate(ids_BT, max_new_tokens=8, do_sample=False)
        config = load_config(tmp_path)
        spans = [load_span(tmp_path, span, dtype=torch.float32) for span in (Span(0, 2), Span(2, 4))]
        edges = load_edges(tmp_path, remote=lambda _: Chained(spans), dtype=torch.float32)
        assert config.quantization_config["quant_method"] == "gptq"
        expected = ids_BT
        for _ in range(8):
            expected = torch.cat([expected, edges(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens_BT, expected)


class Chained(torch.nn.Module):
    """Runs spans one after the other where a client would send hidden states to servers."""

    def __init__(self, spans):
        super().__init__()
        self.spans = spans

    def forward(self, hidden_BTD, *args, **kwargs):
        for span in self.spans:
            hidden_BTD, _ = span(hidden_BTD)
        return hidden_BTD


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_what_is_dequantised_can_be_rounded_anew(quantization, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    family, method, pack, settings = FORMATS["gptq"]
    make(tmp_path, family, method, pack, settings)
    dense = load_span(tmp_path, Span(0, 2), dtype=torch.bfloat16)
    rounded = load_span(tmp_path, Span(0, 2), dtype=quantization)
    assert rounded.weight_bytes < 0.7 * dense.weight_bytes


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        ({"quant_method": "hqq"}, "hqq.*read are awq.*--precision nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*Serve the model that it was made from"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptq.*3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq.*gemv"),
        ({"quant_method": "fp8", "activation_scheme": "unheard of"}, "fp8.*no sense"),
        ({"quant_method": "compressed-tensors", **COMPRESSED, "transform_config": {"u": 1}}, "transformed"),
        ({"bits": 4}, "None"),
    ],
)
def test_other_formats_are_refused_with_a_remedy(stored, why, tmp_path):
    needs(stored.get("quant_method"))
    build_tiny(default_config("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(UnsupportedModel, match=why):
        load_span(tmp_path, Span(0, 1), dtype=torch.float32)


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_packed_weight_that_lacks_a_part_is_refused(part, tmp_path):
    make(tmp_path, "llama", "gptq", pack_gptq, GPTQ)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.up_proj lacks"):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)


def test_a_packed_weight_whose_parts_do_not_fit_is_refused(tmp_path):
    make(tmp_path, "llama", "gptq", pack_gptq, GPTQ)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.scales"] = torch.ones(1, 7, dtype=torch.float16)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadCheckpoint):
        load_span(tmp_path, Span(1, 2), dtype=torch.float32)
