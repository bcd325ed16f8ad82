"""Counting collectives in HLO text: every form in which the TPU compiler writes them."""

import pytest

from imagegpt_jax import collectives
from imagegpt_jax.collectives import Total

MODULE = """HloModule jit_step

%cond (param: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24), metadata={op_name="cond"}
  %param = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (input: bf16[192,8704]) -> bf16[16,8704] {
  %all-reduce.7 = bf16[256,8704]{1,0:T(8,128)} all-reduce(%pad.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[16,8704] dynamic-slice(%all-reduce.7, %o, %z)
}

%start (p: bf16[12,3072]) -> (bf16[12,3072], bf16[96,3072]) {
  %all-gather.1 = bf16[96,3072]{1,0} all-gather(%p), replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  ROOT %custom-call.1 = bf16[96,3072] custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[12,3072]) -> bf16[96,3072] {
  %all-gather.2 = bf16[96,3072]{1,0} all-gather(%p), replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  ROOT %custom-call.2 = bf16[96,3072] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%async_collective_fusion.3 (p: bf16[12,3072]) -> bf16[96,3072] {
  %all-gather.3 = bf16[96,3072]{1,0} all-gather(%p), replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  ROOT %dot = bf16[96,3072] dot(%all-gather.3, %x)
}

%body (param: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (bf16[12,3072], bf16[96,3072]) fusion(%w), kind=kCustom, calls=%start
  %b = bf16[96,3072] fusion(%a), kind=kOutput, calls=%async_collective_fusion.3
  %c = bf16[96,3072] fusion(%a), kind=kCustom, calls=%done
  %d = bf16[16,8704] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %e = bf16[48,8704]{1,0} reduce-scatter(%h), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%init), condition=%cond, body=%body, metadata={op_name="while"}
  %sum = (f32[8]{0}, f32[4]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
  %p1 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  ROOT %out = f32[8] copy(%sum)
}
"""


def test_every_form_is_counted_as_often_as_it_runs():
    counted = collectives.count(MODULE)
    assert counted == {
        # Started, stepped beside a product and ended: one collective. 24 times in the loop, groups of 8.
        "all-gather": Total(24, 24 * 96 * 3072 * 2 * 7 // 8),
        # The fusion, of its padded operand, groups of 4; and the plain one, of 4 times its result.
        "reduce-scatter": Total(48, 24 * (256 * 8704 * 2 * 3 // 4 + 48 * 8704 * 2 * 3)),
        "all-reduce": Total(1, 2 * (8 + 4) * 4 * 7 // 8),
        "collective-permute": Total(1, 16),
    }


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives.count("HloModule x")
