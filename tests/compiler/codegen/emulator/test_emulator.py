"""The emulator bites: faults planted into the text of right kernels are found, each in its own way."""

import dataclasses
import re

import pytest
import torch
from cuda_layer import Routed, excess_error, gate_up_reference, skewed, weights
from tvm.tirx.script import builder as T

from moec.compiler.codegen.cuda import lower
from moec.compiler.codegen.emulator.emulator import Emulated, EmulationError
from moec.compiler.codegen.emulator.ptx import UnmodelledError, replace_assembly
from moec.compiler.kernels.cuda import gemm_mma, gemm_wgmma
from moec.compiler.kernels.cuda.emit import define, ptx, size, sync, tensor, when
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.gemm_wgmma import ROWS, WgmmaTile

pytestmark = pytest.mark.null

MMA = GemmProblem("gate_up", 256, 64, 4, 2), Tile(16, 64, 3, 1, 2)
WGMMA = GemmProblem("gate_up", 256, 32, 3, 2), WgmmaTile(16, 2)


def sources():
    yield "mma", lower("mma", gemm_mma.build(*MMA), "sm_80")
    yield "wgmma", lower("wgmma", gemm_wgmma.build(*WGMMA), "sm_90a", WGMMA[1].boxes(WGMMA[0]))


@pytest.fixture(scope="module")
def texts():
    return dict(sources())


def layer(name):
    """The arguments of a kernel of ragged groups, and its reference."""
    torch.manual_seed(0)
    problem = (MMA if name == "mma" else WGMMA)[0]
    num_tokens = 21 if name == "mma" else 80
    experts = problem.num_experts
    routed = Routed(skewed(num_tokens, experts, 2), experts, 0, 16 if name == "mma" else ROWS)
    x, w = torch.randn(num_tokens, 256).bfloat16(), weights(experts, problem.weight_rows, 256)
    want = gate_up_reference(problem, routed, x, w)
    if name == "wgmma":
        x = x[routed.slot_order.long() // 2]
    y = torch.full((len(routed.slot_order), problem.columns), float("nan")).bfloat16()
    return routed.values() | {"x": x, "w": w, "y": y, "x_rows": len(x), "blocks": 2}, want


def verdict(source, folder):
    """ "right", "wrong result", or the emulator's own message."""
    kernel = Emulated.build(source, folder)
    for lazy, seed in ((False, 1), (True, 2)):
        values, want = layer(source.name)
        try:
            kernel.run(values, source.grid_of(values), lazy, seed)
        except EmulationError as error:
            return str(error)
        if excess_error(values["y"], want, torch.bfloat16) > 2e-5:
            return "wrong result"
    return "right"


END_ROW = r"(int v_\d+ = expert_start_ptr\[\(v_\d+ \+ 1\)\]);"
FAULTS = {
    "a swizzle on one side": ("mma", r"(shared_b16\(a_ptr[^\n]*?)\^", r"\1+", "wrong result"),
    "a wait for one group too few": (
        "mma",
        r"cp\.async\.wait_group 1",
        "cp.async.wait_group 2",
        "copies in flight that nothing waits",
    ),
    "no barrier in the loop": ("mma", r"tvm_builtin_cuda_cta_sync\(\);\n", "", "wrong result"),
    "one row too many": ("mma", END_ROW, r"\1 + 1;", "y was written past its end"),
    "the stride of a descriptor": ("wgmma", r", 1, 64, 3\)", ", 1, 32, 3)", "wrong result"),
    "the wrong half of a step": ("wgmma", r"\+ \(uint64_t\)2ULL", "+ (uint64_t)4ULL", "wrong result"),
    "bytes that never come": ("wgmma", r"\(uint\)20480\)", "(uint)20496)", "deadlock, it waits for an mbarrier"),
    "a barrier that counts half the warps": ("wgmma", r"\(uint\)8\);", "(uint)4);", "deadlock"),
    "a stage that is given back too early": (
        "wgmma",
        r"wait_group\.sync\.aligned 1;",
        "wait_group.sync.aligned 2;",
        "wrong",
    ),
}


@pytest.mark.parametrize("name", ["mma", "wgmma"])
def test_the_kernels_are_right(texts, tmp_path, name):
    assert verdict(texts[name], tmp_path) == "right"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(texts, tmp_path, fault):
    name, pattern, replacement, expected = FAULTS[fault]
    text, count = re.subn(pattern, replacement, texts[name].text)
    assert count, "the fault was not planted"
    assert expected in verdict(dataclasses.replace(texts[name], text=text), tmp_path)


def small(body):
    def emit():
        n = size("n")
        y = tensor("y", (n,), "float32")
        T.device_entry()
        T.cta_id([n])
        body(y, T.thread_id([64]))

    return lower("small", define(emit), "sm_80")


def test_deadlocks_and_guards_are_named(tmp_path):
    def half_syncs(y, thread):
        with when(thread < 32):
            sync()

    def writes_before(y, thread):
        with when(thread == 0):
            T.buffer_store(y, T.float32(1), [T.int32(-1)])

    for body, message in ((half_syncs, "__syncthreads"), (writes_before, "y was written before its start")):
        with pytest.raises(EmulationError, match=message):
            Emulated.build(small(body), tmp_path).run({"y": torch.zeros(4), "n": 1}, (1, 1, 1), False, 1)
    kernel = Emulated.build(small(writes_before), tmp_path)
    with pytest.raises(EmulationError, match=r"grid \(0, 1, 1\), a dimension below 1"):
        kernel.run({"y": torch.zeros(4), "n": 0}, (0, 1, 1), False, 1)
    with pytest.raises(EmulationError, match="contiguous CPU tensors"):
        kernel.run({"y": torch.zeros(4, 4).t(), "n": 1}, (1, 1, 1), False, 1)


def test_an_instruction_without_a_model_is_named():
    with pytest.raises(UnmodelledError, match=r"no model for the PTX 'brkpt;'; add one to"):
        replace_assembly('asm volatile("brkpt;" ::: "memory");')


def test_copies_that_nothing_waits_for_are_found(tmp_path):
    def body(y, thread):
        shared = T.alloc_buffer((256,), "float32", scope="shared.dyn", align=16)
        ptx("cp.async.cg.shared.global", shared.ptr_to([thread * 4]), y.ptr_to([thread * 4]), 16)
        ptx("cp.async.commit_group")

    with pytest.raises(EmulationError, match="it ended with copies in flight"):
        Emulated.build(small(body), tmp_path).run({"y": torch.zeros(256), "n": 1}, (1, 1, 1), True, 1)
