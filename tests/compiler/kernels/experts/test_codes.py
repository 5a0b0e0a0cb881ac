"""The experts kernels of quantised weights against float64 on the numbers that the codes mean."""

import dataclasses

import pytest
import torch
from experts_codes import bound, reference
from experts_layer import random_weights

from moec.compiler.kernels.experts import call, codes
from moec.compiler.kernels.experts.catalogue import (
    AMX_CODES,
    AMX_INT8,
    AVX2_CODES,
    AVX2_FMA,
    AVX2_INT8,
    AVX512_BF16,
    AVX512_CODES,
    AVX512_INT8,
    AVX512F,
    AVX512F_CODES,
    SPECS,
)
from moec.compiler.kernels.spec import ExpertsProblem
from moec.passes.ir import packed as packed_format
from moec.passes.ir.formats import FormatError, parse_format
from moec.passes.ir.quantise import quantise
from moec.runtime.launch.cpu_features import LEVELS

pytestmark = pytest.mark.cpu

BASE = ExpertsProblem(hidden=128, inner=192, num_experts=6, top_k=2, num_shared=1)
FANCY = dataclasses.replace(BASE, act="swigluoai@7.0@1.702", has_bias=True, has_shared_weight=True)
PLAIN = dataclasses.replace(BASE, act="!relu2", weight_on_input=True, num_shared=0)
HALVES = dataclasses.replace(BASE, hidden=96, inner=160)  # groups of 32 that do not fill k steps of 64
FLOATS = dataclasses.replace(BASE, dtype="float32")  # rows that nothing converts
ROWS = dataclasses.replace(BASE, hidden=50, inner=70)  # no multiple of anything: formats with a scale per row

CASES = [
    (AMX_CODES, FANCY, "int4-g32"),
    (AMX_CODES, ROWS, "int8"),
    (AMX_CODES, BASE, "int4-g64-asym"),
    (AMX_CODES, BASE, "nf4-g64"),
    (AMX_CODES, BASE, "int3-g32"),
    (AMX_CODES, HALVES, "int2-g32"),
    (AMX_CODES, HALVES, "int4-g32-asym"),
    (AMX_CODES, HALVES, "mxfp4"),
    (AMX_CODES, BASE, "int2-g16"),
    (AMX_CODES, FANCY, "int4-g64"),
    (AMX_CODES, BASE, "int3-g64"),
    (AMX_CODES, BASE, "int2-g64"),
    (AMX_CODES, PLAIN, "ternary"),
    (AMX_CODES, ROWS, "ternary"),
    (AMX_CODES, ROWS, "fp8"),
    (AMX_CODES, BASE, "mxfp4"),
    (AMX_INT8, ROWS, "int8-w8a8"),
    (AMX_INT8, FANCY, "int4-g64-a8"),
    (AMX_INT8, dataclasses.replace(BASE, hidden=256, inner=128), "int4-g128-a8"),
    (AMX_INT8, PLAIN, "int4-g64-asym-a8"),
    (AMX_INT8, BASE, "int3-g64-a8"),
    (AVX512_CODES, FANCY, "int4-g64-asym"),
    (AVX512_CODES, dataclasses.replace(FANCY, hidden=96, inner=160), "mxfp4"),
    (AVX512_CODES, BASE, "int3-g64"),
    (AVX512_CODES, ROWS, "ternary"),
    (AVX512_CODES, FANCY, "bf16-packed"),
    (AVX512_CODES, ROWS, "bf16-packed"),
    (AVX512_CODES, PLAIN, "bf16-packed"),
    (AVX512F_CODES, FLOATS, "bf16-packed"),
    (AVX512_INT8, FANCY, "int4-g64-a8"),
    (AVX512_INT8, ROWS, "int8-w8a8"),
    (AVX512F_CODES, FLOATS, "int4-g32-asym"),
    (AVX512F_CODES, ROWS, "bf16-packed"),
    (AVX2_CODES, FLOATS, "int8-asym"),
    (AVX2_CODES, FLOATS, "bf16-packed"),
    (AVX2_CODES, HALVES, "mxfp4"),
    (AVX2_CODES, BASE, "int4-g32"),
    (AVX2_CODES, ROWS, "ternary"),
    (AVX2_INT8, BASE, "int4-g64-a8"),
    (AVX2_INT8, ROWS, "int8-w8a8"),
]
EVERY = (
    "int8", "int4-g32-asym", "int4-g64", "int2-g32", "int4-g64-asym", "nf4-g64", "mxfp4", "int3-g32", "int3-g64",
    "int2-g16", "int2-g64", "ternary", "fp8", "int8-g64-f32", "bf16-packed",
)  # fmt: skip
MORE = [(kernel, BASE, name) for kernel in (AVX512_CODES, AVX512F_CODES, AVX2_CODES) for name in EVERY]


def _in(problem, name):
    return dataclasses.replace(problem, format_up=name, format_down=name)


def _check(make_layer, kernel, problem, name):
    layer = make_layer(kernel, _in(problem, name))
    int8 = name.endswith("a8")
    for num_tokens in (1, 3, 17, 33, 70):
        given = layer.inputs(num_tokens, seed=num_tokens)
        expected = reference(layer, *given, int8)
        error = layer.error(layer.run(*given), expected)
        assert error < bound(layer.problem), f"{name}, {num_tokens} tokens: error {error}"
    # two experts get every row, the others none: every way of few rows; more rows than a block, than a step
    for num_tokens in (1, 2, 3, 4, 5, 7, 9, 12, 13, 16, 24, 80):
        x, weights, experts, shared = layer.inputs(num_tokens)
        experts[:, 0], experts[:, 1] = 3, 4
        error = layer.error(layer.run(x, weights, experts, shared), reference(layer, x, weights, experts, shared, int8))
        assert error < bound(layer.problem), f"{name}, {num_tokens} rows of an expert: error {error}"
    x, weights, experts, shared = layer.inputs(0)
    assert layer.run(x, weights, experts, shared).shape == (0, problem.hidden)


@pytest.mark.parametrize(("kernel", "problem", "name"), CASES, ids=lambda v: getattr(v, "level", v))
def test_against_float64(make_layer, kernel, problem, name):
    _check(make_layer, kernel, problem, name)


@pytest.mark.parametrize(("up", "down"), [("mxfp4", "int3-g64"), ("int4-g32", "mxfp4"), ("nf4-g64", "int2-g32")])
def test_two_formats(make_layer, up, down):
    """Rows of x are integers up to another number of rows than those of h, or one of them never."""
    layer = make_layer(AMX_CODES, dataclasses.replace(BASE, format_up=up, format_down=down))
    for num_tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
        x, weights, experts, shared = layer.inputs(num_tokens)
        experts[:, 0], experts[:, 1] = 3, 4
        error = layer.error(
            layer.run(x, weights, experts, shared), reference(layer, x, weights, experts, shared, False)
        )
        assert error < bound(layer.problem), f"{up}, {down}, {num_tokens} rows: error {error}"


@pytest.mark.parametrize(
    ("kernel", "dtype", "name"),
    [
        (AMX_CODES, "bfloat16", "ternary"),
        (AMX_INT8, "bfloat16", "int8-w8a8"),
        (AVX2_CODES, "float32", "int8"),
        (AVX512_CODES, "bfloat16", "bf16-packed"),
    ],
)
def test_columns_that_are_not_there_add_nothing(make_layer, kernel, dtype, name):
    """An activation that makes something of 0, an inner width of no whole panel: codes beyond it do not mean 0."""
    layer = make_layer(kernel, _in(dataclasses.replace(ROWS, act="!sigmoid", dtype=dtype), name))
    for num_tokens in (1, 3, 40):
        given = layer.inputs(num_tokens)
        error = layer.error(layer.run(*given), reference(layer, *given, name.endswith("a8")))
        assert error < bound(layer.problem), f"{name}, {num_tokens} tokens: error {error}"


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "problem", "name"), MORE, ids=lambda v: getattr(v, "level", v))
def test_every_format(make_layer, kernel, problem, name):
    _check(make_layer, kernel, problem, name)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(AMX_CODES, "int4-g32"), (AMX_INT8, "int8-w8a8"), (AVX512_CODES, "int3-g64"), (AVX512_INT8, "int8-w8a8")],
    ids=lambda v: getattr(v, "name", v),
)
def test_threads_and_nan(make_layer, kernel, name):
    """The result does not depend on the threads, and a NaN stays in its row."""
    layer = make_layer(kernel, _in(ROWS if name == "int8-w8a8" else FANCY, name))
    x, weights, experts, shared = layer.inputs(40)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        results.append(layer.run(x, weights, experts, shared))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    x[7, 3] = torch.nan
    y = layer.run(x, weights, experts, shared)
    others = [t for t in range(40) if t != 7]
    assert y[7].isnan().all() and torch.equal(y[others], results[0][others])


@pytest.mark.parametrize(
    ("whole", "name"),
    [(AMX_INT8, "int4-g128-a8"), (AMX_INT8, "int8-w8a8"), (AMX_CODES, "int4-g32"), (AMX_CODES, "mxfp4")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_steps_over_several_panels_change_no_bit(make_layer, whole, name):
    """In both phases, also where panels of a chunk of k do not follow each other (numbers: test_against_float64)."""
    problem = _in(dataclasses.replace(BASE, hidden=384, inner=256), name)
    layers = []
    for sizes in ({"down_panels": 16}, {"down_panels": 1, "task_bytes": 1}):
        blocking = dataclasses.replace(whole.blocking, chunk_bytes=128 * 4 * 32 * 2, **sizes)
        kernel = dataclasses.replace(whole, blocking=blocking, variant=f"panels{sizes['down_panels']}")
        layers.append(make_layer(kernel, problem))
    assert layers[0].kernel.plan(problem).down_depth_chunk == 128
    for rows in (1, 2, 4, 6, 9, 10, 16):
        x, weights, experts, shared = layers[0].inputs(rows)
        experts[:, 0], experts[:, 1] = 3, 4
        several, one = (layer.run(x, weights, experts, shared) for layer in layers)
        assert torch.equal(several, one), f"{name}, {rows} rows"


def test_chunks_of_k(make_layer):
    """A long inner width is done a chunk at a time, where a column has one scale and where groups have theirs."""
    for whole, name in ((AMX_INT8, "int8-w8a8"), (AMX_CODES, "int4-g64"), (AMX_CODES, "int8")):
        kernel = dataclasses.replace(whole, blocking=dataclasses.replace(whole.blocking, chunk_bytes=64 * 4 * 32 * 2))
        problem = _in(dataclasses.replace(BASE, inner=256), name)
        plan = kernel.plan(problem)
        assert plan.down_depth_chunk == 64 and plan.depth_down == 256
        layer = make_layer(kernel, problem)
        for num_tokens in (2, 40):
            given = layer.inputs(num_tokens)
            int8 = name.endswith("a8")
            error = layer.error(layer.run(*given), reference(layer, *given, int8))
            assert error < bound(layer.problem), name


@pytest.mark.parametrize(
    ("packed", "plain"), [(AVX512_CODES, AVX512_BF16), (AVX512F_CODES, AVX512F), (AVX2_CODES, AVX2_FMA)]
)
def test_packed_numbers_give_the_bits_of_bf16(make_layer, packed, plain):
    """Powers of two as scales change no bit of a sum. K in one chunk, no exceptions, which are added last."""
    problem = dataclasses.replace(FANCY, hidden=96, inner=160)
    layers = [make_layer(packed, _in(problem, "bf16-packed")), make_layer(plain, problem)]
    layers = [dataclasses.replace(layer, packed=_without_small(layer)) for layer in layers]
    for num_tokens in (1, 2, 3, 5, 12, 33, 80):
        given = layers[0].inputs(num_tokens)
        assert torch.equal(*(layer.run(*given) for layer in layers)), f"{num_tokens} tokens"


def test_a_panel_has_no_more_exceptions_than_room():
    problem = _in(BASE, "bf16-packed")
    tensors = random_weights(problem)
    tensors["w_down"][2, 32:64, ::2] = 0
    with pytest.raises(FormatError, match=r"32 rows are 0 or under .* bf16-packed has room for 15; choose bf16"):
        call.pack(problem, **tensors)


def _without_small(layer):
    """The layer's weights, numbers under 2**-10 made 2**-10."""
    tensors = dict(layer.tensors)
    for name in ("w_gate_up", "w_down"):
        w = tensors[name]
        tensors[name] = torch.where(w.abs() < 2.0**-10, torch.full_like(w, 2.0**-10), w)
    return call.pack(layer.problem, **tensors)


@pytest.mark.parametrize("kernel", [AVX512_CODES, AVX512F_CODES, AVX2_CODES], ids=lambda v: v.level)
def test_exceptions_of_packed_numbers(make_layer, kernel):
    """0, subnormal and small numbers, rows of nothing else, as many as there is room for; h in chunks of k."""
    kernel = dataclasses.replace(kernel, blocking=dataclasses.replace(kernel.blocking, chunk_bytes=64 * 4 * 32 * 2))
    problem = _in(dataclasses.replace(BASE, inner=256), "bf16-packed")
    tensors = random_weights(problem)
    for w in (tensors["w_gate_up"], tensors["w_down"]):
        w[:, 0], w[:, 1, :3], w[3, 2] = 0, 1e-39, 2.0**-126
        w[3, 40, ::32], w[4, 70, 1::32], w[-1, 5, 0] = 0, w[4, 70, 1::32] * 2.0**-14, -1e-30
        w[3, 96], w[3, 96, :5] = 0, 1e-39
    panel = tensors["w_down"][4, 96:128]
    panel.view(-1)[: packed_format.room(256) - int(packed_format.pack(panel).exceptions.sum())] = 0
    layer = make_layer(kernel, problem)
    layer = dataclasses.replace(layer, tensors=tensors, packed=call.pack(problem, **tensors))
    for num_tokens in (1, 4, 13, 40):
        x, weights, experts, shared = layer.inputs(num_tokens)
        experts[:, 0], experts[:, 1] = 3, 4
        expected = reference(layer, x, weights, experts, shared, False)
        error = layer.error(layer.run(x, weights, experts, shared), expected)
        assert error < bound(layer.problem), f"{num_tokens} tokens: error {error}"


@pytest.mark.parametrize(("hidden", "factor"), [(32768, -1), (33024, 0)])
def test_the_largest_sums_of_integers(make_layer, hidden, factor):
    """Rows of largest numbers that have the sign of their weights, up to where 32 bits may not do and sums are f32."""
    problem = _in(ExpertsProblem(hidden=hidden, inner=32, num_experts=4, top_k=1), "ternary")
    layer = make_layer(AVX512_CODES, problem)
    assert layer.kernel.plan(problem).up.sum_factor == factor
    x, weights, experts, shared = layer.inputs(9)
    for t in range(9):
        x[t] = layer.tensors["w_gate_up"][experts[t, 0], t].sign()
    error = layer.error(layer.run(x, weights, experts, shared), reference(layer, x, weights, experts, shared, False))
    assert error < bound(problem)


def test_refusals_say_why():
    features = frozenset(LEVELS["amx_bf16"])
    by_name = {spec.name: spec for spec in SPECS}

    def reason(kernel, problem, name):
        return by_name[kernel].refusal(_in(problem, name), features)

    assert reason("experts-amx-codes", BASE, "int4-g32") is None
    assert "no multiple of int4-g64's groups" in reason("experts-amx-codes", ROWS, "int4-g64")
    assert reason("experts-amx-codes", BASE, "int8-w8a8") == "weights in int8-w8a8, the kernel has wide rows"
    assert reason("experts-amx-int8", BASE, "int8") == "weights in int8, the kernel has int8 rows"
    assert "cut an int8 tile" in reason("experts-amx-int8", BASE, "int4-g32-a8")
    assert "cut three units of 32 codes" in reason("experts-amx-codes", BASE, "int3-g16")
    assert "none of quantised weights" in reason("experts-amx-bf16", BASE, "int8")
    assert "is for quantised ones" in reason("experts-amx-codes", BASE, "")
    assert "192 values along K are no whole blocks of 128" in reason("experts-amx-codes", BASE, "fp8-block128")
    assert "makes no tiles of them" in reason("experts-amx-codes", BASE, "bf16-packed")
    assert reason("experts-avx512-codes", BASE, "bf16-packed") is None


def _code_in(block, bits, column, k, order):
    """The code of a column and k in a block's codes (u8, without scales), by the definition of codes in bytes."""
    half, place = column // 16, order.index(k % 4)

    if bits == 3:
        step, code = k // 32, k % 32 // 4
        units = [int(block.view(-1, 64)[(2 * step + half) * 3 + u][4 * (column % 16) + place]) for u in range(3)]
        if code < 6:
            return units[code // 2] >> 3 * (code % 2) & 7
        high = sum((units[u] >> 6) << 2 * u for u in range(3))
        return high >> 3 * (code - 6) & 7
    per_unit = 8 // bits
    unit, code = k // 4 // per_unit, k // 4 % per_unit
    return int(block.view(-1, 64)[2 * unit + half][4 * (column % 16) + place]) >> bits * code & (1 << bits) - 1


@pytest.mark.parametrize(
    "name", ["int4-g64", "int3-g64", "int2-g64", "int3-g64-a8", "int4-g64-a8", "int3-g32", "mxfp4"]
)
def test_every_code_is_where_the_definition_says(name):
    """Codes of a random matrix, read back one by one from the packed bytes."""
    format = parse_format(name)
    geometry = codes.of_format(name, 128)
    parts = quantise(torch.randn(32, 128, generator=torch.Generator().manual_seed(3)), format)
    packed = torch.zeros(1, geometry.panel_bytes, dtype=torch.uint8)
    codes.pack_expert(parts, geometry, None, packed)
    order = [0, 1, 2, 3] if name.endswith("a8") else [0, 2, 1, 3]
    for b, block in enumerate(packed.view(2, geometry.block_bytes)[:, geometry.block_head_bytes :]):
        for column in range(32):
            for k in range(64):
                stored = _code_in(block, int(format.bits), column, k, order)
                assert stored - geometry.offset == parts.codes[column, 64 * b + k], (column, k)


@pytest.mark.parametrize(
    "name", ["int8", "int8-w8a8", "int4-g32", "int4-g32-asym", "int3-g32", "int3-g64", "int2-g16", "bf16-packed"]
)
def test_bytes_of_a_panel_are_those_of_the_format(name):
    """A panel holds codes, scales and zeros and nothing else (K is a multiple of every block)."""
    geometry = codes.of_format(name, 256)
    assert geometry.panel_bytes == parse_format(name).matrix_bytes(32, 256)
