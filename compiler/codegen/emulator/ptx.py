"""What each PTX instruction means to the emulator: one C++ statement per instruction, in terms of shim.h."""

from __future__ import annotations

import re
from collections.abc import Callable

from moec.compiler.errors import CompileError


class UnmodelledError(CompileError):
    """A kernel uses an instruction that the emulator does not know."""


Model = Callable[[re.Match[str], list[str]], str]


def _call(template: str) -> Model:
    """{0}, {1} ..: operands of the asm statement; {a}: the first group of the pattern."""
    return lambda match, operands: template.format(*operands, a=match[1] if match.re.groups else "")


def _mma(match: re.Match[str], o: list[str]) -> str:
    fp8 = "true" if match["type"] == "e4m3" else "false"
    return (
        f"float d_[4], c_[4] = {{{', '.join(o[10:14])}}}; uint32_t ab_[6] = {{{', '.join(o[4:10])}}}; "
        f"emu::mma<{fp8}>(d_, ab_, c_); " + " ".join(f"{o[i]} = d_[{i}];" for i in range(4))
    )


def _ldmatrix(match: re.Match[str], o: list[str]) -> str:
    n, turned = int(match["n"]), "true" if match["trans"] else "false"
    return f"uint32_t* out_[] = {{{', '.join('&' + r for r in o[:n])}}}; emu::ldmatrix<{turned}>(out_, {n}, {o[n]});"


def _wgmma(match: re.Match[str], o: list[str]) -> str:
    n = int(match["n"]) // 2
    fp8 = "true" if match["type"] == "e4m3" else "false"
    registers = ", ".join("&" + r for r in o[:n])
    return (
        f"static_assert({n} <= 128); emu::Wgmma g_{{{{{registers}}}, {n}, {o[n]}, {o[n + 1]}, (int){o[n + 2]}, {fp8}}};"
        " emu::wgmma(g_);"
    )


def _load(match: re.Match[str], o: list[str]) -> str:
    n = int(match["n"] or 1)
    return f"const uint32_t* p_ = (const uint32_t*)emu::aligned({o[n]}, {4 * n});" + "".join(
        f" {o[i]} = p_[{i}];" for i in range(n)
    )


def _load_shared(match: re.Match[str], o: list[str]) -> str:
    n = int(match["n"] or 1)
    place = f'emu::shared_at({o[n]}, {4 * n}, {4 * n}, "ld.shared")'
    return f"const uint32_t* p_ = (const uint32_t*){place};" + "".join(f" {o[i]} = p_[{i}];" for i in range(n))


def _store_shared(match: re.Match[str], o: list[str]) -> str:
    return f'*(uint32_t*)emu::shared_at({o[0]}, 4, 4, "st.shared") = {o[1]};'


def _store(match: re.Match[str], o: list[str]) -> str:
    n = int(match["n"] or 1)
    return f"uint32_t* p_ = (uint32_t*)emu::aligned({o[0]}, {4 * n});" + "".join(
        f" p_[{i}] = {o[i + 1]};" for i in range(n)
    )


_TYPES = r"(?P<type>bf16|e4m3)\.(?P=type)"
MODELS: tuple[tuple[str, Model], ...] = (
    (rf"mma\.sync\.aligned\.m16n8k(?:16|32)\.row\.col\.f32\.{_TYPES}\.f32", _mma),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<n>[124])(?P<trans>\.trans)?\.shared\.b16", _ldmatrix),
    (rf"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?:16|32)\.f32\.{_TYPES}", _wgmma),
    (r"wgmma\.commit_group", _call("emu::wgmma_commit();")),
    (r"wgmma\.wait_group\.sync\.aligned (\d+)", _call("emu::wgmma_wait({a});")),
    (r"wgmma\.fence", _call("")),
    (
        r"cp\.async\.c[ag]\.shared\.global(?:\.L2::128B)? \[%0\], \[%1\], (\d+), %2",
        _call("emu::cp_async({0}, {1}, {a}, {2});"),
    ),
    (
        r"cp\.async\.c[ag]\.shared\.global(?:\.L2::128B)? \[%0\], \[%1\], (\d+)",
        _call("emu::cp_async({0}, {1}, {a}, {a});"),
    ),
    (r"cp\.async\.commit_group", _call("emu::cp_commit();")),
    (r"cp\.async\.wait_group (\d+)", _call("emu::cp_wait({a});")),
    (
        r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.mbarrier::complete_tx::bytes",
        _call("emu::tma_load({0}, (const CUtensorMap*){1}, {2}, {3}, {4});"),
    ),
    (r"ld\.shared(?:\.v(?P<n>\d))?\.b32", _load_shared),
    (r"st\.shared\.b32", _store_shared),
    (r"fma\.rn\.bf16x2", _call("{0} = emu::fma_bf16x2({1}, {2}, {3});")),
    (r"ld\.global(?:\.nc|\.cg)?(?:\.L1::no_allocate)?(?:\.v(?P<n>\d))?\.b32", _load),
    (r"st\.global(?:\.v(?P<n>\d))?\.b32", _store),
    (r"ld\.acquire\.gpu\.global\.s32", _call("{0} = emu::acquire((const int*){1});")),
    (r"cvt\.rn\.bf16x2\.f32", _call("{0} = emu::pack_bf16({2}, {1});")),
    (r"cvt\.rn\.satfinite\.e4m3x2\.f32", _call("{0} = emu::pack_e4m3({2}, {1});")),
    (r"mbarrier\.init", _call("emu::mbar_init({0}, {1});")),
    (r"mbarrier\.arrive\.expect_tx", _call("emu::mbar_arrive({0}, 1, {1});")),
    (r"mbarrier\.arrive\.shared", _call("emu::mbar_arrive({0}, {1}, 0);")),
    (r"mbarrier\.try_wait\.parity", _call("emu::mbar_wait({0}, {1});")),
    (r"red\.global\.add\.f32", _call("*(float*){0} += {1};")),
    (r"setmaxnreg|fence\.proxy|fence\.mbarrier_init|^$", _call("")),
    (r"griddepcontrol", _call("")),
)

_ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r'"[=+&]*[a-z]"\s*\(\s*([^()]+(?:\([^()]*\))?[^()]*)\)')


def replace_assembly(source: str) -> str:
    """C++ source with every asm statement replaced by its model. Raises: UnmodelledError."""
    out, at = [], 0
    while found := _ASM.search(source, at):
        end = _closing(source, found.end())
        statement = source[found.end() : end]
        out += [source[at : found.start()], "{ ", _model(statement), " }"]
        at = source.index(";", end) + 1
    return "".join([*out, source[at:]])


def _closing(source: str, at: int) -> int:
    """Where the parenthesis that was opened before `at` closes; strings are skipped."""
    depth = 1
    while depth:
        if source[at] == '"':
            at = _STRING.match(source, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        at += 1
    return at - 1


def _model(statement: str) -> str:
    colon = _first_colon(statement)
    text = "".join(_STRING.findall(statement[:colon])).replace("\\n", " ").strip()
    operands = [o.strip() for o in _OPERAND.findall(statement[colon:])]
    for pattern, model in MODELS:
        if match := re.search(pattern, text):
            return model(match, operands)
    raise UnmodelledError(
        f"the emulator has no model for the PTX {text!r}; add one to compiler/codegen/emulator/ptx.py"
    )


def _first_colon(statement: str) -> int:
    """Where the operand lists of an asm statement begin."""
    at = 0
    while at < len(statement):
        if statement[at] == '"':
            at = _STRING.match(statement, at).end()  # type: ignore[union-attr]
            continue
        if statement[at] == ":":
            return at
        at += 1
    return at
