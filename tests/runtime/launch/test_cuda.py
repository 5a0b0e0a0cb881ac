"""The CUDA loader against a driver that only listens: what it would launch, and what it refuses."""

import ctypes
import struct
import types

import pytest
import torch

from moec.runtime.launch import cuda
from moec.runtime.launch.cuda import CudaError, Driver, Kernel, check_device

pytestmark = pytest.mark.null

LAUNCH = {
    "symbol": "down_kernel",
    "threads": 384,
    "shared_bytes": 65536,
    "grid": ["(n + 2) // 3", "1", "1"],
    "parameters": [
        {"name": "y", "kind": "pointer"},
        {"name": "x_map", "kind": "map", "box": {"tensor": "x", "columns": 64, "rows": 128}},
        {"name": "eps", "kind": "float"},
        {"name": "n", "kind": "int"},
    ],
}


class Listening:
    """A driver's library that notes calls; fails: names of calls that return an error."""

    def __init__(self, version=13000, fails=(), resident=2):
        self.version, self.fails, self.resident, self.calls = version, fails, resident, []

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuDriverGetVersion":
                arguments[0]._obj.value = self.version
            if name == "cuOccupancyMaxActiveBlocksPerMultiprocessor":
                arguments[0]._obj.value = self.resident
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_INVALID_VALUE"
                return 0
            if name == "cuLaunchKernel":  # arguments live as long as the call
                self.arguments = [ctypes.string_at(p, 4 if i > 1 else 8) for i, p in enumerate(arguments[9])]
                self.map_address = arguments[9][1]
            self.calls.append((name, arguments))
            return 1 if name in self.fails else 0

        return call

    def last(self, name):
        return [a for n, a in self.calls if n == name][-1]


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is a CUDA tensor."""

    device = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(cuda.torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))


def tensors():
    return {"x": torch.zeros(300, 256).bfloat16().as_subclass(OnGpu), "y": torch.zeros(4).as_subclass(OnGpu)}


def test_a_launch_is_what_the_kernel_says(stream):
    library = Listening()
    kernel = Kernel.load(Driver(library), b"cubin", LAUNCH)
    assert library.last("cuFuncSetAttribute")[1:][0] == 8 and library.last("cuFuncSetAttribute")[2].value == 65536
    values = tensors()
    kernel(**values, eps=0.5, n=7)
    function, *sizes, shared, on, _, extra = library.last("cuLaunchKernel")
    assert (sizes, shared, on.value, extra) == ([3, 1, 1, 384, 1, 1], 65536, 77, None) and function is kernel.function
    assert int.from_bytes(library.arguments[0], "little") == values["y"].data_ptr()
    assert library.map_address % 64 == 0
    assert struct.unpack("<f", library.arguments[2]) == (0.5,) and struct.unpack("<i", library.arguments[3]) == (7,)


def test_blocks_that_wait_for_each_other_are_launched_together(stream):
    library = Listening()
    launch = LAUNCH | {"cooperative": True, "blocks_per_sm": 2}
    Kernel.load(Driver(library), b"cubin", launch)(**tensors(), eps=0.5, n=7)
    _, *sizes, shared, on, pointers = library.last("cuLaunchCooperativeKernel")
    assert (sizes, shared, on.value, len(pointers)) == ([3, 1, 1, 384, 1, 1], 65536, 77, 4)
    assert "cuLaunchKernel" not in [name for name, _ in library.calls]
    *_, threads, shared_bytes = library.last("cuOccupancyMaxActiveBlocksPerMultiprocessor")
    assert (threads, shared_bytes.value) == (384, 65536)
    with pytest.raises(
        CudaError, match="down_kernel: 1 of its blocks fit on a multiprocessor together, its launch has 2;"
    ):
        Kernel.load(Driver(Listening(resident=1)), b"cubin", launch)
    Kernel.load(Driver(Listening(resident=0)), b"cubin", LAUNCH)  # blocks that wait for nobody may be few


def test_a_tensor_map_is_made_once(stream):
    library = Listening()
    kernel, values = Kernel.load(Driver(library), b"cubin", LAUNCH), tensors()
    for _ in range(2):
        kernel(**values, eps=0.5, n=7)
    made = [a for name, a in library.calls if name == "cuTensorMapEncodeTiled"]
    assert len(made) == 1
    _, dtype, rank, address, sizes, pitch, box, steps, interleave, swizzle, promotion, fill = made[0]
    assert (dtype, rank, address.value, list(sizes), list(pitch)) == (9, 2, values["x"].data_ptr(), [256, 300], [512])
    assert (list(box), list(steps), interleave, swizzle, promotion, fill) == ([64, 128], [1, 1], 0, 3, 2, 0)


def test_nothing_to_do_is_no_launch(stream):
    library = Listening()
    Kernel.load(Driver(library), b"cubin", LAUNCH)(**tensors(), eps=0.5, n=0)
    assert not [n for n, _ in library.calls if n == "cuLaunchKernel"]


def test_refusals_name_the_reason(stream, monkeypatch):
    with pytest.raises(CudaError, match=r"the CUDA driver is for 12\.4, the kernels need 13\.0; install"):
        Driver(Listening(12040))
    with pytest.raises(CudaError, match=r"cuModuleLoadData: CUDA_ERROR_INVALID_VALUE \(1\)"):
        Kernel.load(Driver(Listening(fails=["cuModuleLoadData"])), b"", LAUNCH)
    kernel = Kernel.load(Driver(Listening()), b"cubin", LAUNCH)
    with pytest.raises(CudaError, match="down_kernel: y is a tensor on cpu, expected a contiguous CUDA tensor"):
        kernel(**tensors() | {"y": torch.zeros(4)}, eps=0.5, n=7)
    with pytest.raises(CudaError, match="down_kernel: y is int"):
        kernel(**tensors() | {"y": 3}, eps=0.5, n=7)
    huge = Kernel.load(Driver(Listening()), b"cubin", LAUNCH | {"grid": ["1", "n", "1"]})
    with pytest.raises(CudaError, match=r"a grid of \[1, 70000, 1\]"):
        huge(**tensors(), eps=0.5, n=70000)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("absent")))
    with pytest.raises(CudaError, match=r"no CUDA driver on this machine \(absent\); use an engine for the CPU"):
        Driver()


def test_which_device_runs_what():
    for arch, capability in (("sm_80", (8, 6)), ("sm_89", (8, 9)), ("sm_90a", (9, 0)), ("sm_120a", (12, 0))):
        check_device(arch, capability)
    for arch, capability in (("sm_90a", (10, 0)), ("sm_89", (8, 6)), ("sm_100a", (10, 3))):
        with pytest.raises(CudaError, match=f"the kernels are for {arch}, the device is sm_"):
            check_device(arch, capability)


def test_a_tensor_between_two_addresses_that_kernels_load_is_refused(stream):
    library = Listening()
    kernel, values = Kernel.load(Driver(library), b"cubin", LAUNCH), tensors()
    shifted = torch.zeros(20)[1:].as_subclass(OnGpu)
    with pytest.raises(CudaError, match=r"^down_kernel: y starts at no multiple of 16 bytes$"):
        kernel(**values | {"y": shifted}, eps=0.5, n=7)
    kernel(**values, eps=0.5, n=7)
    assert [n for n, _ in library.calls].count("cuLaunchKernel") == 1


def test_a_step_gives_what_its_kernel_takes(stream):
    """Names in the order of a program; a program of another kernel is refused when it is loaded, not when it runs."""
    library = Listening()
    kernel, values = Kernel.load(Driver(library), b"cubin", LAUNCH), tensors()
    kernel.ordered(("n", "y", "eps", "x"))(7, values["y"], 0.5, values["x"])
    assert struct.unpack("<i", library.arguments[3]) == (7,)
    for names, given in ((("n", "y", "eps"), "eps, n, y"), (("n", "y", "eps", "x", "z"), "eps, n, x, y, z")):
        with pytest.raises(
            CudaError, match=f"^down_kernel: a step gives {given}, the kernel takes eps, n, x, y; compile"
        ):
            kernel.ordered(names)
