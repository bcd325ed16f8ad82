"""Bytes between HBM and the chip, read from a piece of HLO text."""

import pytest

TEXT = """HloModule jit_step

%fused (a: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} negate(%a)
}

ENTRY %main (p0: bf16[64,32], p1: f32[8,16], p2: s32[]) -> f32[8,16] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = f32[8,16]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %slice-start.1 = ((bf16[64,32]{1,0}), bf16[16,32]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%p0), slice={}
  %slice-done.1 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %copy-start.2 = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p1)
  %copy-done.2 = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%copy-start.2)
  %near = f32[1,16]{1,0:T(8,128)S(1)} fusion(%slice-done.1, %copy-done.2), calls=%fused, metadata={op_name="x/%p0"}
  %far = (f32[4]{0:T(128)}, f32[2]{0:T(128)S(1)}) fusion(%p0, %near), kind=kLoop, calls=%fused
  %element = f32[4]{0:T(128)} get-tuple-element(%far), index=0
  %used = f32[4]{0:T(128)S(1)} fusion(%element), kind=kLoop, calls=%fused
  ROOT %updated = f32[8,16]{1,0:T(8,128)} dynamic-update-slice(%p1, %near, %p2, %p2)
}
"""


@pytest.fixture
def traffic(load_tool):
    return load_tool("scale/traffic.py")


def test_what_lies_in_vmem_does_not_count(traffic):
    fetched = 16 * 32 * 2 + 8 * 16 * 4  # by slice-start and copy-start, read once
    far = 64 * 32 * 2 + 4 * 4  # p0 read, the tuple's first array written
    used = 4 * 4
    updated = 16 * 4  # one row written, in place
    assert traffic.hbm_bytes(TEXT) == fetched + far + used + updated


def test_what_is_fetched_for_the_next_run_counts_once(traffic):
    """At the end of this run; the copy at its beginning is made by the first run alone."""
    before = traffic.hbm_bytes(TEXT)
    early = TEXT.replace("copy-start(%p1)", "copy-start(%p1), cross_program_prefetch_index=0")
    assert traffic.hbm_bytes(early) == before
    again = "  %copy-start.9 = (f32[8,16]{1,0:S(1)}, f32[8,16]{1,0}, u32[]{:S(2)}) copy-start(%p1)\n  ROOT"
    assert traffic.hbm_bytes(early.replace("  ROOT %updated", f"{again} %updated")) == before
    assert traffic.hbm_bytes(TEXT.replace("  ROOT %updated", f"{again} %updated")) == before + 8 * 16 * 4


def test_the_largest_array_of_a_type_is_found_wherever_it_is(traffic):
    assert traffic.largest(TEXT, "f32") == 8 * 16 * 4
    assert traffic.largest(TEXT, "bf16") == 64 * 32 * 2
    assert traffic.largest(TEXT, "s64") == 0


def test_scores_of_attention_are_found(traffic):
    text = TEXT.replace("%inner = f32[8]{0}", "%inner = (f32[2,257,384]{2,1,0}, pred[256,257]{1,0})")
    assert traffic.largest_square(text, 257) == 2 * 257 * 384 * 4
    assert traffic.largest_square(TEXT, 257) == 0
    assert traffic.largest_square(text, 8) == 0  # [8, 16] holds one length
