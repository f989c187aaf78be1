"""What is read off the text of a compiled GPU program."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import gpu_programs  # noqa: E402 (as the scripts import it)

# Shortened from what XLA's GPU compiler makes of batch norm, with parts of other programs.
TEXT = """HloModule jit_run, is_scheduled=true

%fused_reduce (param_0: bf16[64,128]) -> (f32[4,128], f32[4,128]) {
  %param_0 = bf16[64,128]{1,0} parameter(0)
  %wide = f32[64,128]{1,0} convert(%param_0)
  %zero = f32[] constant(0)
  %bitcast.1 = f32[4,16,128]{2,1,0} bitcast(%wide)
  %sum = f32[4,128]{1,0} reduce(%bitcast.1, %zero), dimensions={1}, to_apply=%region_0.1
  ROOT %pair = (f32[4,128]{1,0}, f32[4,128]{1,0}) tuple(%sum, %sum)
}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_slice (param_0.1: bf16[64,128], param_1.1: f32[128]) -> f32[4,128] {
  %param_0.1 = bf16[64,128]{1,0} parameter(0)
  %param_1.1 = f32[128]{0} parameter(1)
  %wide.1 = f32[64,128]{1,0} convert(%param_0.1)
  %some = f32[4,128]{1,0} slice(%wide.1), slice={[0:64:16], [0:128]}
  %each = f32[4,128]{1,0} broadcast(%param_1.1), dimensions={1}
  ROOT %difference = f32[4,128]{1,0} subtract(%some, %each)
}

%fused_update (param_0.2: f32[64,128], param_1.2: f32[4,128], param_2.2: s32[]) -> f32[64,128] {
  %param_0.2 = f32[64,128]{1,0} parameter(0)
  %param_1.2 = f32[4,128]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %origin = s32[] constant(0)
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %origin)
}

%gemm_fusion_dot_computation (param_0.3: bf16[64,128], param_1.3: bf16[128,8]) -> bf16[64,8] {
  %param_0.3 = bf16[64,128]{1,0} parameter(0)
  %param_1.3 = bf16[128,8]{1,0} parameter(1)
  ROOT %dot = bf16[64,8]{1,0} dot(%param_0.3, %param_1.3), lhs_contracting_dims={1}
}

%guarded (arg: (bf16[64,128], f32[128])) -> f32[128] {
  %arg = (bf16[64,128]{1,0}, f32[128]{0}) parameter(0)
  %x.2 = bf16[64,128]{1,0} get-tuple-element(%arg), index=0
  ROOT %again = f32[128]{0} fusion(%x.2), kind=kInput, calls=%fused_columns, ESTIMATED_2.5
}

%fused_columns (param_0.4: bf16[64,128]) -> f32[128] {
  %param_0.4 = bf16[64,128]{1,0} parameter(0)
  %wide.4 = f32[64,128]{1,0} convert(%param_0.4)
  %zero.4 = f32[] constant(0)
  ROOT %sum.4 = f32[128]{0} reduce(%wide.4, %zero.4), dimensions={0}, to_apply=%region_0.1
}

%kept (arg.1: f32[128]) -> f32[128] {
  ROOT %arg.1 = f32[128]{0} parameter(0)
}

%body (state: (f32[128])) -> (f32[128]) {
  %state = (f32[128]{0}) parameter(0)
  %old = f32[128]{0} get-tuple-element(%state), index=0
  %copied = f32[128]{0} copy(%old)
  ROOT %next = (f32[128]{0}) tuple(%copied)
}

%until (state.1: (f32[128])) -> pred[] {
  %state.1 = (f32[128]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main.1 (x: bf16[64,128], w: bf16[128,8], m: f32[128], p: pred[], i: s32[]) -> f32[128] {
  %x = bf16[64,128]{1,0} parameter(0), metadata={op_name="arrays[\\'x\\'] (a comment)"}
  %w = bf16[128,8]{1,0} parameter(1)
  %m = f32[128]{0} parameter(2)
  %p = pred[] parameter(3)
  %i = s32[] parameter(4)
  LINES
  ROOT %result = (f32[128]{0}, /*index=1*/f32[128]{0}) tuple(%m, /*index=1*/%m)
}
"""
X, M = 64 * 128 * 2, 128 * 4  # bytes


def estimates(*given):
    costs = ",".join(
        f'{{"end_to_end_cycles":9.5,"exec_time_us":{us},"compute_time_us":1,"name":"{model}"}}'
        for model, us in given
    )
    return f'backend_config={{"operation_queue_id":"0","reification_cost":[{costs}]}}'


def read(*lines):
    text = TEXT.replace("LINES", "\n  ".join(lines))
    text = text.replace("ESTIMATED_2.5", estimates(("", 2.5), ("sol", 2)))
    return gpu_programs.program(text)


def only(*lines):
    """The one step of a program with these lines, and nothing else."""
    found = read(*lines)
    assert found.in_branches == [] and found.conditionals == 0
    (step,) = found.steps
    return step


SUMS = (
    "%sums = (f32[4,128]{1,0}, /*index=1*/f32[4,128]{1,0}) fusion(%x), kind=kInput,"
    " calls=%fused_reduce, "
)


def test_a_fusion_reads_its_operands_and_writes_all_its_results():
    assert only(SUMS + estimates(("", 1.5), ("sol", 1))) == (
        *("sums", "fusion", X, 2 * 4 * M),
        1.5,
    )


@pytest.mark.parametrize(
    ("given", "microseconds"),
    [
        ([("", 1.5), ("sol", 1)], 1.5),
        ([("sol", 1), ("", 2e-05)], 2e-05),
        ([("", 1.5), ("sol", 1), ("indexing-cost-model", 0.75)], 0.75),
        ([], None),
    ],
)
def test_the_estimate_is_of_the_model_that_the_compiler_goes_by(given, microseconds):
    assert only(SUMS + estimates(*given)).microseconds == microseconds


def test_a_slice_counts_what_it_reads():
    step = only("%d = f32[4,128]{1,0} fusion(%x, %m), kind=kLoop, calls=%fused_slice")
    assert (step.read, step.written) == (X // 16 + M, 4 * M)
    step = only("%s = bf16[4,128]{1,0} slice(%x), slice={[0:64:16], [0:128]}")
    assert (step.read, step.written) == (X // 16, X // 16)


def test_an_update_in_place_counts_what_is_new():
    made = "%all = f32[64,128]{1,0} parameter(5)", "%part = f32[4,128]{1,0} parameter(6)"
    update = (
        "%u = f32[64,128]{1,0} fusion(%all, %part, %i), kind=kLoop, calls=%fused_update",
        "%u = f32[64,128]{1,0} dynamic-update-slice(%all, %part, %i, %i)",
    )
    for each, indices in zip(update, (1, 2), strict=True):
        step = only(*made, each)
        assert (step.read, step.written) == (4 * M + indices * 4, 4 * M)


def test_products_of_matrices_and_calls_have_no_estimate_and_workspaces_are_not_counted():
    product = (
        "%g = bf16[64,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_fusion_dot_computation, "
    )
    step = only(product + estimates(("", 7000)))
    assert step == ("g", "fusion", X + 128 * 8 * 2, 64 * 8 * 2, None)
    for target, more in (("__cublas$lt$matmul", 0), ("my_kernel", 256)):
        shape = "(bf16[64,8]{1,0}, s8[256]{0})"
        call = f'%c = {shape} custom-call(%x, %w), custom_call_target="{target}"'
        assert only(call) == ("c", "custom-call", X + 128 * 8 * 2, 64 * 8 * 2 + more, None)


def test_what_branches_do_is_apart():
    found = read(
        "%both = (bf16[64,128]{1,0}, f32[128]{0}) tuple(%x, %m)",
        SUMS + estimates(("", 1.5)),
        "%c = f32[128]{0} conditional(%p, %m, %both), true_computation=%kept,"
        " false_computation=%guarded",
    )
    assert [step.name for step in found.steps] == ["sums"]
    assert found.in_branches == [("again", "fusion", X, M, 2.5)]
    assert found.conditionals == 1
    assert gpu_programs.moved(found.steps) == X + 8 * M
    assert gpu_programs.estimated(found.in_branches) == 2.5


def test_a_collective_that_is_started_and_waited_for_is_one_step():
    lines = (
        "%r = f32[128]{0} all-reduce-start(%m), to_apply=%region_0.1",
        "%done = f32[128]{0} all-reduce-done(%r)",
    )
    assert only(*lines) == ("r", "all-reduce-start", M, M, None)
    lines = (
        "%r = (f32[128]{0}, f32[8,128]{1,0}) all-gather-start(%m), dimensions={0}",
        "%done = f32[8,128]{1,0} all-gather-done(%r)",
    )
    assert only(*lines) == ("r", "all-gather-start", M, 8 * M, None)


@pytest.mark.parametrize(
    ("trips", "times"), [(', backend_config={"known_trip_count":{"n":"12"}}', 12), ("", 1)]
)
def test_a_loop_counts_as_often_as_it_is_known_to_run(trips, times):
    found = read(
        "%start = (f32[128]{0}) tuple(%m)",
        f"%w = (f32[128]{{0}}) while(%start), condition=%until, body=%body{trips}",
    )
    assert found.steps == times * [("copied", "copy", M, M, None)]


def test_the_figures_of_a_program_that_this_machine_compiles():
    compiled = jax.jit(lambda x: jnp.sum(jnp.sin(x))).lower(jnp.ones(1000)).compile()
    found = gpu_programs.figures(compiled)
    assert found["bytes_moved"] >= 4000 and found["kernels"] >= 1
    assert found["conditionals"] == found["estimated_us"] == found["bytes_in_branches"] == 0
    assert found["kernels_without_estimate"] == found["kernels"]
