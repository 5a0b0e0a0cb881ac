"""What this machine can do for moec, and what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

REQUIRED_TO_RUN = ("torch", "apache-tvm-ffi", "numpy", "safetensors")
REQUIRED_TO_COMPILE = ("apache-tvm", "transformers")
OPTIONAL = (("tokenizers", "`moec run --prompt` needs it"), ("scipy", "`moec plan` needs it"))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. state: "ok", "missing" (something does not work), or "note"."""

    topic: str
    state: str
    text: str


def examine() -> list[Finding]:
    """Looks at the processor, the threads, the packages, the compilers and the GPU; runs nothing heavy."""
    return [*_processor(), *_memory(), *_threads(), *_packages(), *_onnxruntime(), *_toolchain(), *_gpu()]


def _processor() -> list[Finding]:
    from moec.runtime.launch.cpu_features import detect_features

    features = sorted(detect_features())
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in features), None)
    found = [Finding("processor", "ok", f"{_model_name()}, {os.cpu_count()} logical processors")]
    if best is None:
        return [*found, Finding("kernels", "missing", "no AVX2: moec has no CPU kernels for this processor")]
    return [*found, Finding("kernels", "ok", f"best instruction set: {best} (all: {', '.join(features)})")]


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _memory() -> list[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return []
    return [Finding("memory", "ok", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")]


def _threads() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    return [Finding("threads", "ok", f"torch uses {torch.get_num_threads()}; kernels share its OpenMP pool")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    found = []
    for job, packages in (("run", REQUIRED_TO_RUN), ("compile", REQUIRED_TO_COMPILE)):
        for package in packages:
            version = _version(package)
            state = "ok" if version else "missing"
            hint = "pip install 'moec[compiler]'" if job == "compile" else "pip install moec"
            found.append(Finding(package, state, version or f"not installed: cannot {job} engines; {hint}"))
    for package, why in OPTIONAL:
        version = _version(package)
        found.append(Finding(package, "ok" if version else "note", version or f"not installed: {why}"))
    return found


def _onnxruntime() -> list[Finding]:
    """Which ONNX Runtime is installed, and on which providers a session really runs."""
    from moec.compiler.export.onnx.session import OnnxRuntimeError, installed, working_providers

    found = installed()
    if not found:
        return [Finding("onnxruntime", "note", "not installed: `moec export-onnx` needs it; pip install 'moec[onnx]'")]
    try:
        providers = working_providers()
    except OnnxRuntimeError as error:
        return [Finding("onnxruntime", "missing", str(error))]
    ((package, version),) = found.items()
    return [Finding("onnxruntime", "ok", f"{package} {version}, runs on {', '.join(providers)}")]


def _toolchain() -> list[Finding]:
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        return [Finding("linker", "missing", "no cc or gcc on PATH: engines cannot be linked; install gcc")]
    first = subprocess.run([cc, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    nvcc = shutil.which("nvcc")
    cuda = Finding("nvcc", "ok", nvcc) if nvcc else Finding("nvcc", "note", "not found: only CPU engines")
    return [Finding("linker", "ok", f"{cc}: {first[0] if first else 'unknown version'}"), cuda]


def _gpu() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("gpu", "note", "none found: engines run on the processor")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [Finding("gpu", "ok", ", ".join(names))]
