"""Counting collectives in HLO text: every form in which the TPU compiler writes them."""

import pytest

from imagegpt_jax.perf import hlo
from imagegpt_jax.perf.hlo import Total

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
    counted = hlo.count(MODULE)
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
        hlo.count("HloModule x")


def crossing(rendezvous, transfer="ALL_REDUCE", target='"{1,2}x{0:15}"'):
    """What the compiler writes at the `send` and the `recv` of a transfer between slices."""
    return (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="{rendezvous}",_xla_megascale_reduce_operation="SUM",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"}}'
    )


# From a training step of B, 4 layers, on two slices of v5e-16.
TWO_SLICES = f"""HloModule jit_step

ENTRY %main (p: f32[8]) -> f32[8] {{
  %send = (f32[1,1,128]{{2,1,0:T(1,128)}}, u32[], token[]) send(%x, %after-all), {crossing("all-reduce.30")}
  %recv = (f32[1,1,128]{{2,1,0:T(1,128)}}, u32[], token[]) recv(%after-all), {crossing("all-reduce.30")}
  %send-done = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %recv-done = (f32[1,1,128]{{2,1,0:T(1,128)}}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %send.11 = (bf16[864,8,128]{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) send(%y, %after-all.11), {crossing("psum.68_0")}
  %log = (f32[4]{{0}}, u32[], token[]) send(%z, %after-all.12), channel_id=9, is_host_transfer=true
  ROOT %out = f32[8] copy(%sum)
}}
"""


def test_what_crosses_slices_is_a_kind_of_its_own():
    assert hlo.count(TWO_SLICES) == {"between-slices": Total(2, 4 * 128 + 2 * 864 * 8 * 128)}


@pytest.mark.parametrize(
    ("transfer", "target", "times"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', 2 * 3 / 4),
        ("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"', 3 / 4),
        ("ALL_GATHER", '"{1,2,3,4}x{0:3}"', 3),  # the payload is one slice's part
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", 1 / 2),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", 1),
    ],
)
def test_slices_make_a_ring(transfer, target, times):
    text = TWO_SLICES.replace(crossing("psum.68_0"), crossing("psum.68_0", transfer, target))
    assert hlo.count(text)["between-slices"].bytes == 4 * 128 + times * 2 * 864 * 8 * 128


def test_types():
    arrays = hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[5]{0}, s32[])")
    assert [(array.bytes, array.in_hbm) for array in arrays] == [
        (12, False),
        (5, True),
        (4, True),
    ]
