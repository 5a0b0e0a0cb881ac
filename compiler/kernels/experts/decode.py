"""From the words of packed codes to numbers in registers, as LLVM-IR functions that are inlined into a kernel.

For bf16 arithmetic a word (i32) has a code of an even k in its low and one of an odd k in its high lane. `word` gives
the two bf16 numbers, for the processor's pair product and AMX; `low` and `high` one of them in f32. Where a table has
at most 16 numbers it is looked up by a permutation; integer codes, codebooks other than NF4 and e4m3
are exact in bf16. For int8 and int16 arithmetic `quad` gives the four unsigned codes of a word; codes made for int16
have bf16 numbers too: pairs from the even and from the odd bytes of a word, or f32 numbers of one byte.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts import packed_bf16
from moec.compiler.kernels.experts.codes import Codes

_PERMUTE = """
declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
"""
_PERMUTE_AVX2 = "\ndeclare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)\n"
_TABLE_64 = "\ndeclare <64 x i8> @llvm.x86.avx512.permvar.qi.512(<64 x i8>, <64 x i8>)\n"
_TABLE_16 = "\ndeclare <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8>, <64 x i8>)\n"
_FIELDS = "\ndeclare <64 x i8> @llvm.x86.vgf2p8affineqb.512(<64 x i8>, <64 x i8>, i8)\n"


def float_bits(x: float) -> str:
    """A float32 as LLVM writes it."""
    return "0x" + struct.pack(">d", struct.unpack("f", struct.pack("f", x))[0]).hex().upper()


def _bf16_bits(values: list[float]) -> list[int]:
    return [n & 0xFFFF for n in torch.tensor(values).to(torch.bfloat16).view(torch.int16).tolist()]


class Decoder:
    """The functions of one format on one instruction set. lanes: i32 words of a register.

    native: the processor has pair products of bf16, so words are wanted. fields: it takes a bit field out of every
    byte by one instruction (a product with a matrix of bits).
    """

    def __init__(self, codes: Codes, lanes: int, native: bool, fields: bool) -> None:
        self.codes, self.lanes, self.native, self.fields = codes, lanes, native, fields
        kind = (
            "e4m3" if codes.is_e4m3 else codes.format.name.split("-")[0] if codes.format.kind == "codebook" else "int"
        )
        reads = "q" if codes.int8 else "n" if native else "p"
        order = ("s" if codes.split else "") + ("x" if codes.scales_exponents else "")
        self._tag = f"{kind}{codes.bits}o{codes.offset}_{reads}{order}{lanes}"

    def text(self) -> str:
        """LLVM IR of all functions."""
        if self.codes.int8:
            return self._quads_text()
        if self.codes.split:
            return self._split_text()
        if self.codes.is_packed:
            return packed_bf16.decoder_text(self._tag, self.lanes, self.native)
        count = 6 if self.codes.bits == 3 else 16 // self.codes.bits
        if self.native:
            scalable = [j for j in range(count) if self.codes.scales_exponents]
            words = [self._word_text(j) for j in range(count)] + [self._word_text(j, True) for j in scalable]
            return _PERMUTE + "".join(words)
        permute = _PERMUTE if self.lanes == 16 else _PERMUTE_AVX2
        return permute + "".join(self._number_text(j, high) for j in range(count) for high in (False, True))

    def _quads_text(self) -> str:
        table = self.codes.format.kind == "codebook"
        declared = (_TABLE_64 if self.fields else _TABLE_16) if table else _FIELDS if self.fields else ""
        count = 8 if self.codes.bits == 3 else 8 // self.codes.bits
        return declared + "".join(self._quad_text(j) for j in range(count))

    def _split_text(self) -> str:
        count = 8 if self.codes.bits == 3 else 8 // self.codes.bits
        permute = _PERMUTE if self.lanes == 16 else _PERMUTE_AVX2
        if not self.native:
            return permute + "".join(self._byte_text(j, byte) for j in range(count) for byte in range(4))
        kinds = (False, True) if self.codes.scales_exponents else (False,)
        words = "".join(self._half_quad_text(j, odd, x) for j in range(count) for odd in range(2) for x in kinds)
        return permute + self._quads_text() + words

    # -- emitters --

    def _call(self, kind: str, name: str, words: list[Any]) -> Any:
        return T.Bind(T.call_extern(f"{kind}x{self.lanes}", f"moec_{name}_{self._tag}", *words))

    def word(self, j: int, words: list[Any]) -> Any:
        """bf16 pairs of code j of the words (of three vectors, for the sixteenth 3-bit code: j = 5)."""
        return self._call("int32", f"word{j}", words)

    def pair(self, j: int, words: list[Any]) -> tuple[Any, Any]:
        """The same as f32: even k, odd k."""
        return self._call("float32", f"low{j}", words), self._call("float32", f"high{j}", words)

    def quad(self, j: int, words: list[Any]) -> Any:
        """The four unsigned codes j of each word, a byte each (of three vectors, for the last 3-bit codes)."""
        return self._call("int32", f"quad{j}", words)

    def pairs(self, j: int, words: list[Any], scalable: bool = False) -> list[Any]:
        """bf16 pairs of codes j of the words, in the order of k: one vector, or two of codes made for int16.

        scalable: for scales that are added to exponents: 0 has one too, it stands as 2**-40.
        """
        kind = "scalable" if scalable else "word"
        return [self._call("int32", f"{kind}{j}{half}", words) for half in (("e", "o") if self.codes.split else ("",))]

    def byte(self, j: int, words: list[Any], byte: int) -> Any:
        """f32 of code j in one byte of the words; codes made for int16."""
        return self._call("float32", f"byte{j}_{byte}", words)

    # -- text --

    def _define(self, result: str, name: str, body: list[str], inputs: int = 1) -> str:
        words = f"<{self.lanes} x i32>"
        given = ", ".join(f"{words} %w{i}" for i in range(inputs))
        head = f"define linkonce_odr {result} @moec_{name}_{self._tag}({given}) alwaysinline {{"
        return "\n".join([head, *("  " + line for line in body), "}", ""])

    def _sixteenth(self, shifts: tuple[int, int, int]) -> list[str]:
        """%x: the 3-bit code in the highest bits of three words' lanes."""
        kind = f"<{self.lanes} x i32>"
        lines = []
        for i, shift in enumerate(shifts):
            lines += [
                f"%s{i} = lshr {kind} %w{i}, splat (i32 {shift})",
                f"%m{i} = and {kind} %s{i}, splat (i32 {1 << i})",
            ]
        return [*lines, f"%o = or {kind} %m0, %m1", f"%x = or {kind} %o, %m2"]

    def _field(self, j: int) -> tuple[list[str], int, int]:
        """%q: words whose bytes have code j from a bit on; that bit; how many vectors of words it takes."""
        bits, kind = self.codes.bits, f"<{self.lanes} x i32>"
        if bits != 3 or j < 6:
            return [f"%q = or {kind} %w0, zeroinitializer"], bits * (j % 2 if bits == 3 else j), 1
        lines = []
        for u, shift in enumerate((6, 4, 2)):
            lines += [
                f"%s{u} = lshr {kind} %w{u}, splat (i32 {shift})",
                f"%m{u} = and {kind} %s{u}, splat (i32 {0x03030303 << 2 * u})",
            ]
        return [*lines, f"%o = or {kind} %m0, %m1", f"%q = or {kind} %o, %m2"], 3 * (j - 6), 3

    def _quad_text(self, j: int) -> str:
        kind = f"<{self.lanes} x i32>"
        if self.codes.format.kind == "codebook":
            return self._quad_of_table(j)
        if self.fields and self.codes.bits < 8:
            return self._quad_of_fields(j)
        mask = ((1 << self.codes.bits) - 1) * 0x01010101
        signed = mask - (1 << 32) if mask >= 1 << 31 else mask
        lines, first, inputs = self._field(j)
        body = [
            *lines,
            f"%s = lshr {kind} %q, splat (i32 {first})",
            f"%r = and {kind} %s, splat (i32 {signed})",
            f"ret {kind} %r",
        ]
        return self._define(kind, f"quad{j}", body, inputs)

    def _quad_of_fields(self, j: int) -> str:
        """A mask where the code begins at bit 0, else one instruction for each unit that has bits of it."""
        bits = self.codes.bits
        if bits != 3 or j < 6:
            fields = [(0, bits * (j % 2 if bits == 3 else j), bits, 0)]
        else:
            fields = [(0, 6, 2, 0), (1, 6, 1, 2)] if j == 6 else [(1, 7, 1, 0), (2, 6, 2, 1)]
        lines = [line for n, field in enumerate(fields) for line in _field_of_bytes(f"%f{n}", *field)]
        if len(fields) == 1:
            return self._define("<16 x i32>", f"quad{j}", [*lines, "ret <16 x i32> %f0"])
        return self._define("<16 x i32>", f"quad{j}", [*lines, "%r = or <16 x i32> %f0, %f1", "ret <16 x i32> %r"], 3)

    def _quad_of_table(self, j: int) -> str:
        """Codes of 4 bits -> their bytes. A table of 64 has them four times: the other code of a byte may stay."""
        values = ", ".join(f"i8 {v}" for v in self.codes.bytes * 4)
        lines = [f"%s = lshr <16 x i32> %w0, splat (i32 {4 * j})"]
        if not self.fields:
            lines.append(f"%m = and <16 x i32> %s, splat (i32 {0x0F0F0F0F})")
        name = "permvar.qi" if self.fields else "pshuf.b"
        return self._define(
            "<16 x i32>",
            f"quad{j}",
            [
                *lines,
                f"%b = bitcast <16 x i32> {'%s' if self.fields else '%m'} to <64 x i8>",
                f"%t = call <64 x i8> @llvm.x86.avx512.{name}.512(<64 x i8> <{values}>, <64 x i8> %b)",
                "%r = bitcast <64 x i8> %t to <16 x i32>",
                "ret <16 x i32> %r",
            ],
        )

    def _byte_text(self, j: int, byte: int) -> str:
        """i32 lanes -> f32 of code j in a byte."""
        n = self.lanes
        lines, first, inputs = self._field(j)
        lines += [
            f"%s = lshr <{n} x i32> %q, splat (i32 {8 * byte + first})",
            f"%x = and <{n} x i32> %s, splat (i32 {(1 << self.codes.bits) - 1})",
        ]
        return self._define(f"<{n} x float>", f"byte{j}_{byte}", lines + self._lookup(self.codes.numbers), inputs)

    def _half_quad_text(self, j: int, odd: int, scalable: bool) -> str:
        """16 i32 lanes -> bf16 pairs of codes j in their even or odd bytes."""
        lines, first, inputs = self._field(j)
        lines += [
            "%v = bitcast <16 x i32> %q to <32 x i16>",
            f"%x = lshr <32 x i16> %v, splat (i16 {8 * odd + first})",
            *self._permuted(scalable),
        ]
        return self._define("<16 x i32>", f"{'scalable' if scalable else 'word'}{j}{'eo'[odd]}", lines, inputs)

    def _permuted(self, scalable: bool = False) -> list[str]:
        """%x (codes in 16-bit lanes, anything above them) -> ret their bf16 numbers."""
        numbers = [number or 2.0**-40 if scalable else number for number in self.codes.numbers]
        values = ", ".join(f"i16 {v}" for v in _bf16_bits([numbers[i & (len(numbers) - 1)] for i in range(32)]))
        call = f"call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> <{values}>, <32 x i16> %x)"
        return [f"%p = {call}", "%r = bitcast <32 x i16> %p to <16 x i32>", "ret <16 x i32> %r"]

    def _word_text(self, j: int, scalable: bool = False) -> str:
        """16 i32 lanes -> bf16 pairs."""
        if self.codes.is_e4m3:
            return self._define("<16 x i32>", f"word{j}", _e4m3_words(j))
        if self.codes.bits == 8:
            return self._define("<16 x i32>", f"word{j}", _int8_words(j, self.codes.offset))
        inputs = 1
        if self.codes.bits == 3 and j == 5:
            inputs = 3
            lines = []
            for i in range(3):
                lines += [
                    f"%v{i} = bitcast <16 x i32> %w{i} to <32 x i16>",
                    f"%s{i} = lshr <32 x i16> %v{i}, splat (i16 {15 - i})",
                    f"%m{i} = and <32 x i16> %s{i}, splat (i16 {1 << i})",
                ]
            lines += ["%o = or <32 x i16> %m0, %m1", "%x = or <32 x i16> %o, %m2"]
        else:
            lines = [
                "%v = bitcast <16 x i32> %w0 to <32 x i16>",
                f"%x = lshr <32 x i16> %v, splat (i16 {self.codes.bits * j})",
            ]
        name = f"scalable{j}" if scalable else f"word{j}"
        return self._define("<16 x i32>", name, lines + self._permuted(scalable), inputs)

    def _number_text(self, j: int, high: bool) -> str:
        """i32 lanes -> f32 of the low or high lane's code j."""
        n, bits, numbers = self.lanes, self.codes.bits, self.codes.numbers
        base = 16 if high else 0
        inputs = 1
        if bits == 3 and j == 5:
            inputs = 3
            lines = self._sixteenth((base + 15, base + 14, base + 13))
        else:
            mask = (1 << bits) - 1
            lines = [
                f"%s = lshr <{n} x i32> %w0, splat (i32 {base + bits * j})",
                f"%x = and <{n} x i32> %s, splat (i32 {mask})",
            ]
        name = f"{'high' if high else 'low'}{j}"
        return self._define(f"<{n} x float>", name, lines + self._lookup(numbers), inputs)

    def _lookup(self, numbers: tuple[float, ...]) -> list[str]:
        """%x (a code in each lane) -> ret its number."""
        n = self.lanes
        if self.codes.is_e4m3:
            return _e4m3_floats(n)
        if self.codes.format.kind == "int":
            offset = float_bits(float(self.codes.offset))
            return [
                f"%f = uitofp <{n} x i32> %x to <{n} x float>",
                f"%r = fsub <{n} x float> %f, splat (float {offset})",
                f"ret <{n} x float> %r",
            ]
        halves = [", ".join(f"float {float_bits(v)}" for v in part) for part in (numbers[:8], numbers[8:])]
        if n == 16:
            table = f"<16 x float> <{halves[0]}, {halves[1]}>"
            call = f"call <16 x float> @llvm.x86.avx512.permvar.sf.512({table}, <16 x i32> %x)"
            return [f"%r = {call}", "ret <16 x float> %r"]
        calls = [
            f"%t{i} = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{half}>, <8 x i32> %x)"
            for i, half in enumerate(halves)
        ]
        return [
            *calls,
            "%c = icmp ugt <8 x i32> %x, splat (i32 7)",
            "%r = select <8 x i1> %c, <8 x float> %t1, <8 x float> %t0",
            "ret <8 x float> %r",
        ]


def _field_of_bytes(name: str, word: int, first: int, count: int, to: int) -> list[str]:
    """name = bits [first, first + count) of the bytes of %w<word>, from bit `to` on; nothing beside them."""
    if first == to:
        mask = ((1 << count) - 1 << first) * 0x01010101
        return [f"{name} = and <16 x i32> %w{word}, splat (i32 {mask})"]
    # byte 7 - i of the matrix: the bits of a byte whose sum modulo 2 becomes its bit i
    matrix = sum(1 << (8 * (7 - to - i) + first + i) for i in range(count))
    signed = matrix - (1 << 64) if matrix >= 1 << 63 else matrix
    table = f"<64 x i8> bitcast (<8 x i64> splat (i64 {signed}) to <64 x i8>)"
    return [
        f"{name}b = bitcast <16 x i32> %w{word} to <64 x i8>",
        f"{name}a = call <64 x i8> @llvm.x86.vgf2p8affineqb.512(<64 x i8> {name}b, {table}, i8 0)",
        f"{name} = bitcast <64 x i8> {name}a to <16 x i32>",
    ]


def _int8_words(j: int, offset: int) -> list[str]:
    """Bytes j of both lanes, less the offset, as bf16: integers of 8 bits are exact, so their f32 is cut."""
    lines = []
    for name, base in (("a", 0), ("b", 16)):
        lines += [
            f"%{name}s = lshr <16 x i32> %w0, splat (i32 {base + 8 * j})",
            f"%{name}x = and <16 x i32> %{name}s, splat (i32 255)",
            f"%{name}m = or <16 x i32> %{name}x, splat (i32 1258291200)",  # the f32 2**23 + code
            f"%{name}g = bitcast <16 x i32> %{name}m to <16 x float>",
            f"%{name}f = fsub <16 x float> %{name}g, splat (float {float_bits(8388608.0 + offset)})",
            f"%{name}i = bitcast <16 x float> %{name}f to <16 x i32>",
        ]
    return [
        *lines,
        "%l = lshr <16 x i32> %ai, splat (i32 16)",
        "%h = and <16 x i32> %bi, splat (i32 -65536)",
        "%r = or <16 x i32> %l, %h",
        "ret <16 x i32> %r",
    ]


def _e4m3_words(j: int) -> list[str]:
    """e4m3 codes in 16-bit lanes -> bf16: the exponent moves by 120, subnormals come from a table."""
    small = _bf16_bits([(i & 7) * 2.0**-9 for i in range(32)])
    table = ", ".join(f"i16 {v}" for v in small)
    kind = "<32 x i16>"
    return [
        f"%v = bitcast <16 x i32> %w0 to {kind}",
        f"%x = lshr {kind} %v, splat (i16 {8 * j})",
        f"%b = and {kind} %x, splat (i16 127)",
        f"%t = shl {kind} %b, splat (i16 4)",
        f"%big = add {kind} %t, splat (i16 {120 << 7})",
        f"%little = call {kind} @llvm.x86.avx512.permvar.hi.512({kind} <{table}>, {kind} %x)",
        f"%c = icmp ult {kind} %b, splat (i16 8)",
        f"%m = select <32 x i1> %c, {kind} %little, {kind} %big",
        f"%g = and {kind} %x, splat (i16 128)",
        f"%sign = shl {kind} %g, splat (i16 8)",
        f"%p = or {kind} %m, %sign",
        f"%r = bitcast {kind} %p to <16 x i32>",
        "ret <16 x i32> %r",
    ]


def _e4m3_floats(n: int) -> list[str]:
    """e4m3 codes in 32-bit lanes -> f32; a subnormal is what its mantissa adds to the smallest normal number."""
    kind, wide = f"<{n} x i32>", f"<{n} x float>"
    return [
        f"%b = and {kind} %x, splat (i32 127)",
        f"%t = shl {kind} %b, splat (i32 20)",
        f"%c = icmp ult {kind} %b, splat (i32 8)",
        f"%e = select <{n} x i1> %c, {kind} splat (i32 {121 << 23}), {kind} splat (i32 {120 << 23})",
        f"%i = add {kind} %t, %e",
        f"%f = bitcast {kind} %i to {wide}",
        f"%d = select <{n} x i1> %c, {wide} splat (float {float_bits(2.0**-6)}), {wide} zeroinitializer",
        f"%v = fsub {wide} %f, %d",
        f"%g = and {kind} %x, splat (i32 128)",
        f"%sign = shl {kind} %g, splat (i32 24)",
        f"%vi = bitcast {wide} %v to {kind}",
        f"%p = or {kind} %vi, %sign",
        f"%r = bitcast {kind} %p to {wide}",
        f"ret {wide} %r",
    ]
