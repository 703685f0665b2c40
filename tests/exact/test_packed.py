"""Rows packed side by side give what each gives alone on the exact path, up to the rounding of other kernels."""

# T tokens, N packed tokens, D model width

import copy
import re
from pathlib import Path

import pytest
import torch

from corolla.blocks import FAMILIES, GrowingKV, PackedRow, build_tiny, check_family, split_model
from corolla.blocks.zoo import default_config, tiny_config
from corolla.cache import RowKV
from corolla.errors import UnsupportedModel, UsageError
from corolla.terms import Span

TOLERANCE = 1e-5
"""Relative to the largest number, in float32: another kernel adds the same products in another order, so that each
block may move a result by some roundings (6e-8 each)."""

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
ROWS = {
    family: tuple(answer == "yes" for answer in answers)
    for family, *answers in re.findall(
        r"^\| `([^`]+)` \| yes \| (yes|no) \| (yes|no) \| (yes|no) \|", TABLE.read_text(), re.M
    )
}
PACKABLE = [family for family, (is_packable, _, _) in ROWS.items() if is_packable]
LEAN = [family for family, (_, is_lean, _) in ROWS.items() if is_lean]


class AloneAndPacked:
    """One span, run both ways over the same hidden states."""

    def __init__(self, family, rows, *, is_lean=False):
        (self.span,) = split_model(build_tiny(default_config(family)), [Span(0, 4)], is_lean=is_lean)
        self.hidden = torch.randn(rows, 64, self.span.hidden_size)
        self.starts = [0] * rows
        self.kvs = [GrowingKV() for _ in range(rows)]
        self.caches = [self.span.new_cache() for _ in range(rows)]

    def step(self, counts):
        """Give each row so many tokens; return how far the two ways are apart, relative to the largest number."""
        rows = [row for row, count in enumerate(counts) if count]
        pieces = [self.hidden[row, self.starts[row] : self.starts[row] + counts[row]] for row in rows]
        packed = [PackedRow(self.starts[row], counts[row], self.kvs[row]) for row in rows]
        packed_ND, taps = self.span.forward_packed(torch.cat(pieces), packed, taps={1})
        alone, alone_taps = [], []
        for row, piece in zip(rows, pieces, strict=True):
            output_BTD, tapped = self.span(piece[None], cache=self.caches[row], taps={1})
            alone.append(output_BTD[0])
            alone_taps.append(tapped[1][0])
            self.starts[row] += counts[row]
        return max(distance(packed_ND, torch.cat(alone)), distance(taps[1], torch.cat(alone_taps)))


def distance(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_table_in_the_docs_lists_the_families_that_are_tested():
    assert list(ROWS) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_finds_what_the_table_in_the_docs_says(family):
    report = check_family(default_config(family))
    assert report.is_supported, report.reason
    assert (report.is_packable, report.is_lean, report.can_rewind) == ROWS[family], report.reason


@pytest.mark.parametrize("family", PACKABLE)
@torch.inference_mode()
def test_rows_that_begin_go_on_and_decode_give_what_each_gives_alone(family):
    both = AloneAndPacked(family, rows=4)
    assert both.step([14, 3, 0, 1]) < TOLERANCE  # a prompt longer than the window, a short one, one of a single token
    assert both.step([1, 9, 2, 1]) < TOLERANCE  # decoding, a second chunk that crosses the window, a latecomer
    assert both.step([1, 1, 1, 1]) < TOLERANCE
    assert both.step([0, 7, 0, 12]) < TOLERANCE
    assert both.step([1, 1, 1, 1]) < TOLERANCE


@pytest.mark.parametrize("family", LEAN)
@torch.inference_mode()
def test_lean_blocks_give_what_the_blocks_themselves_give(family):
    both = AloneAndPacked(family, rows=4, is_lean=True)
    for counts in ([14, 3, 0, 1], [1, 9, 2, 1], [1, 0, 0, 0], [0, 1, 1, 1], [0, 7, 0, 12], [1, 1, 1, 1]):
        assert both.step(counts) < TOLERANCE


def test_blocks_that_join_the_same_parts_otherwise_are_not_lean():
    config = default_config("granite")
    assert check_family(config).is_lean
    config.residual_multiplier = 0.22
    report = check_family(config)
    assert report.is_packable
    assert not report.is_lean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_lean_blocks_in_half_precision_are_as_near_to_the_truth_as_the_blocks_themselves(dtype):
    (truth,) = split_model(build_tiny(tiny_config("qwen3")), [Span(0, 4)])
    half = build_tiny(tiny_config("qwen3")).to(dtype)
    (plain,) = split_model(half, [Span(0, 4)])
    (lean,) = split_model(copy.deepcopy(half), [Span(0, 4)], is_lean=True)
    hidden_ND = torch.randn(9, truth.hidden_size).to(dtype)

    def run(span):
        kv = GrowingKV()
        outputs = [span.forward_packed(hidden_ND[:8].to(span.dtype), [PackedRow(0, 8, kv)])[0]]
        outputs.append(span.forward_packed(hidden_ND[8:].to(span.dtype), [PackedRow(8, 1, kv)])[0])
        return torch.cat(outputs).float()

    expected = run(truth)
    assert distance(run(lean), expected) < 1.5 * distance(run(plain), expected)
    assert lean.weight_bytes == plain.weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lean_span_still_runs_forward_and_back_bit_for_bit(dtype):
    model = build_tiny(tiny_config("qwen2")).to(dtype)
    (plain,) = split_model(model, [Span(0, 4)])
    (lean,) = split_model(copy.deepcopy(model), [Span(0, 4)], is_lean=True)
    hidden_BTD = torch.randn(2, 7, plain.hidden_size).to(dtype)

    def run(span):
        input_BTD = hidden_BTD.clone().requires_grad_()
        output_BTD, _ = span(input_BTD)
        output_BTD.square().sum().backward()
        return output_BTD, input_BTD.grad

    for actual, expected in zip(run(lean), run(plain), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "llama4_text"])
@torch.inference_mode()
def test_one_row_decodes_token_by_token_from_nothing(family):
    both = AloneAndPacked(family, rows=1)
    assert max(both.step([1]) for _ in range(20)) < TOLERANCE


@pytest.mark.parametrize("family", ["phi3/longrope", "llama/dynamic"])
@torch.inference_mode()
def test_rows_of_any_length_share_a_run_where_rotary_tables_depend_on_it(family):
    both = AloneAndPacked(family, rows=3)
    assert both.step([4, 30, 9]) < TOLERANCE
    assert both.step([1, 1, 1]) < TOLERANCE
    assert both.step([1, 1, 1]) < TOLERANCE


@torch.inference_mode()
def test_decoding_reads_the_stored_tokens_where_they_are():
    (span,) = split_model(build_tiny(tiny_config("llama")), [Span(0, 1)])
    stored = (torch.randn(2, 512, 16), torch.randn(2, 512, 16))

    class Fixed:
        def append(self, block, key_HTD, value_HTD):
            return (stored,)

    row = PackedRow(511, 1, Fixed())
    token_ND = torch.randn(1, span.hidden_size)
    span.forward_packed(token_ND, [row])
    with torch.profiler.profile(profile_memory=True) as profile:
        span.forward_packed(token_ND, [row])
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < stored[0].nbytes / 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 1, 3), (20, 1, 17)], ids=str)
@torch.inference_mode()
def test_rows_that_share_their_beginning_get_what_each_gets_alone(family, counts):
    (span,) = split_model(build_tiny(default_config(family)), [Span(0, 4)], is_packable=True)
    shared, *own = torch.randn(600 + 2 * sum(counts), span.hidden_size).split((600, *counts, *counts))
    first, alone = RowKV(windows=span.windows), [GrowingKV(), GrowingKV()]
    for kv in (first, *alone):
        span.forward_packed(shared, [PackedRow(0, 600, kv)])
    first.commit(600)
    begin = max(500, first.shortest)
    rows = [first, first.fork(begin)]
    assert rows[1].shared_tokens == begin
    alone[1].stored = {block: tuple(part[:, :begin] for part in pair) for block, pair in alone[1].stored.items()}
    for step, count in enumerate(counts):
        pieces = [own[step], own[len(counts) + step]]
        packed = [PackedRow(row.length, count, row) for row in rows]
        found_ND, _ = span.forward_packed(torch.cat(pieces), packed)
        for row, kv, piece_ND, found in zip(rows, alone, pieces, found_ND.split(count), strict=True):
            expected_ND, _ = span.forward_packed(piece_ND, [PackedRow(row.length, count, kv)])
            assert distance(found, expected_ND) < TOLERANCE
            row.commit(row.length + count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_shared_beginning_in_half_precision_is_as_near_to_the_truth_as_one_of_its_own(dtype):
    (truth,) = split_model(build_tiny(tiny_config("qwen3")), [Span(0, 4)], is_packable=True)
    (half,) = split_model(build_tiny(tiny_config("qwen3")).to(dtype), [Span(0, 4)], is_packable=True)
    hidden_ND = torch.randn(601, truth.hidden_size).to(dtype)

    def run(span, *, shares):
        row = RowKV()
        span.forward_packed(hidden_ND[:600].to(span.dtype), [PackedRow(0, 600, row)])
        row.commit(600)
        kv = row.fork() if shares else row
        return span.forward_packed(hidden_ND[600:].to(span.dtype), [PackedRow(600, 1, kv)])[0].float()

    expected_ND = run(truth, shares=False)
    assert distance(run(half, shares=True), expected_ND) < 1.5 * distance(run(half, shares=False), expected_ND)


@torch.inference_mode()
def test_a_part_of_the_span_stores_under_the_numbers_of_its_blocks():
    (span,) = split_model(build_tiny(tiny_config("qwen3")), [Span(1, 4)])
    kv = GrowingKV()
    span.forward_packed(torch.randn(3, span.hidden_size), [PackedRow(0, 3, kv)], blocks=Span(2, 4))
    assert sorted(kv.stored) == [2, 3]


def test_rows_that_do_not_add_up_are_refused():
    (span,) = split_model(build_tiny(tiny_config("llama")), [Span(0, 4)])
    with pytest.raises(UsageError, match="2 new tokens, but 3"):
        span.forward_packed(torch.zeros(3, span.hidden_size), [PackedRow(0, 2, GrowingKV())])


def test_a_family_with_an_attention_of_its_own_is_refused():
    (span,) = split_model(build_tiny(tiny_config("gptj")), [Span(0, 4)])
    with pytest.raises(UnsupportedModel, match="a way of its own"):
        span.forward_packed(torch.zeros(3, span.hidden_size), [PackedRow(0, 3, GrowingKV())])
