"""What is checked before an engine is put on a GPU, and what is said when it does not fit; no GPU is needed."""

import pytest
import torch

from moec.runtime.cuda_engine import CudaEngine
from moec.runtime.errors import DeviceMemoryError, FormatError, TargetError
from moec.runtime.executor import Executor
from moec.runtime.launch import cuda_device
from moec.runtime.launch.cuda import CudaError
from moec.runtime.launch.cuda_device import CudaDevice, free_memory, load_kernels, open_device, to_device
from moec.runtime.program import Buffer, Program, Step
from moec.runtime.source import Place

pytestmark = pytest.mark.null


class Fake:
    """A device of 4 GiB, 1 of them free."""

    torch_device, name, capability, multiprocessors = torch.device("cpu"), "fake", (9, 0), 132

    def memory_bytes(self):
        return 1 << 30, 4 << 30


def manifest(level="sm_90a", **more):
    return {"target": {"kind": "cuda", "level": level}, **more}


def test_the_device_is_what_the_engine_is_for():
    device = Fake()
    assert open_device(manifest(), device) is device
    with pytest.raises(
        CudaError, match=r"^the kernels are for sm_89, the device is sm_90; compile with --target cuda:sm_90"
    ):
        open_device(manifest("sm_89"), device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(TargetError, match=r"^the engine is for a GPU, and torch \S+ \w.*; run it on a GPU machine$"):
        CudaDevice()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cuda_device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_device.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        TargetError, match=r"^there is no device 'cuda:2' for a GPU engine; this machine has cuda:0, cuda:1$"
    ):
        CudaDevice("cuda:2")


class Large(torch.Tensor):
    """A weight for which the device has no memory."""

    def to(self, *arguments, **named):
        raise torch.OutOfMemoryError("no")


def test_weights_that_do_not_fit_name_both_sizes():
    small, large = torch.zeros(1 << 18), torch.zeros(1 << 28, device="meta").as_subclass(Large)
    with pytest.raises(DeviceMemoryError) as caught:
        to_device({"a": small, "b": large}, Fake())
    message = str(caught.value)
    assert message.startswith(
        "the engine has 1.00 GiB of weights, fake has 1.00 GiB free of 4.00 GiB; compile it for more"
    )
    assert "\n" not in message and caught.value.__cause__ is None
    assert to_device({"a": small}, Fake())["a"].shape == small.shape  # the process goes on


def test_kernels_that_the_program_does_not_describe(tmp_path):
    with pytest.raises(FormatError, match=r"^program\.json: its kernels cannot be read \(KeyError\('file'\)\)"):
        load_kernels(tmp_path, {"gate": {}}, Fake())


class Scarce:
    """A kernel that finds no memory as long as it is told so."""

    full = True

    def ordered(self, names):
        assert names == ("x", "n")
        return self

    def __call__(self, x, n):
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        x.add_(n)


def test_a_step_without_memory_names_step_and_sizes_and_the_next_one_runs():
    buffers = (Buffer("x", "float32", ("T", 4), "input"), Buffer("y", "float32", ("T", 4), "arena", "T*0"))
    kwargs = {"x": {"buffer": 0}, "n": {"multiprocessors": 2}}
    steps = (Step("kernel", "add", "node", kwargs=kwargs),)
    kernel, device = Scarce(), Fake()
    place = Place(torch.device("cpu"), "cuda", device.multiprocessors, memory=lambda: free_memory(device))
    run = Executor(Program(("T",), buffers, (0,), (0,), steps, "T*64"), {}, {"add": kernel}, place=place)
    x = torch.zeros(4096, 4)
    with pytest.raises(DeviceMemoryError) as caught:
        run([x])
    assert str(caught.value) == (
        "step 0 (kernel add, node node): out of memory with T=4096: the arena takes 0.2 MiB, fake has 1.00 GiB free of "
        "4.00 GiB; feed fewer tokens at a time, or make a smaller cache"
    )
    assert caught.value.__cause__ is None  # it would keep the step's tensors
    kernel.full = False
    assert run([x])[0].unique().tolist() == [264]


def test_a_cache_that_does_not_fit_names_its_size(monkeypatch, tmp_path):
    def refuse(*size, **named):
        raise torch.OutOfMemoryError("no")

    buffers = tuple(Buffer(n, "int64", ("T",), "input") for n in ("tokens", "positions", "slots"))
    program = Program(("T",), buffers, (0, 1, 2), (0,), ())
    cache = {"name": "k", "shape": [2, 64], "dtype": "bfloat16"}
    content = manifest(kind="language_model", model={"max_positions": 0}, caches=[cache])
    engine = CudaEngine(tmp_path, content, Executor(program, {}, {}), Fake())
    monkeypatch.setattr("moec.runtime.kv_cache.torch.zeros", refuse)
    expected = (
        r"^a cache of 7 sequences of 65536 tokens takes 0\.12 GiB, fake has 1\.00 GiB free of 4\.00 GiB; ask for fewer"
    )
    with pytest.raises(DeviceMemoryError, match=expected):
        engine.new_cache(7, 65536)
    monkeypatch.undo()
    assert engine.new_cache(7, 16).tensors[0].shape == (8, 16, 2, 64)
