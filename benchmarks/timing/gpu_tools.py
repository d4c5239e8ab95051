"""What `benchmarks/gpu.py` measures with: a file of results that is whole after each of them, times by CUDA events, CUDA graphs, counted work, kernels,
blocks compiled by inductor.

On the CPU, for tests, a stand-in takes the place of a graph, and compilation stops before inductor.
"""

import copy
import gc
import hashlib
import json
import os
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.full_size import make_task

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
CLASSES = {  # of kernels, by what their names hold; the first that fits
    "compiled": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "fprop", "winograd"),
    "layout": ("nchw", "nhwc", "copy", "catarray", "transpose", "memcpy", "memset"),
    "matmul": ("gemm", "nvjet", "cublas", "cutlass", "splitk"),
    "norm": ("norm", "moments"),
    "elementwise": ("elementwise", "vectorized", "gelu", "silu", "softmax", "reduce"),
}
COLUMNS = {  # of the tables: the key of a result -> its heading
    "eager ms": "eager", "direct ms": "direct", "graph ms": "graph", "ms": "ms", "goal ms": "goal", "floor ms": "floor",
    "chosen ms": "chosen", **{f"{name} ms": name for name in BACKENDS}, "compile s": "compile s", "share": "share",
    "error": "error", "equal": "equal", "equal to the first": "again", "eager GiB": "GiB", "graph GiB": "GiB graph",
    "peak GiB": "GiB", "PSNR": "PSNR",
}  # fmt: skip
SMALL = {512: 32, 1024: 64, 2048: 96}  # what --tiny takes for sizes of pictures
WIDTH = 100  # of what is printed
GIB = 2**30


class Bench:
    """Results by part and name. A measurement for which the time does not suffice is left out, one that fails is recorded as failed."""

    def __init__(self, file: Path, start: float, minutes: float, tiny: bool):
        self.file, self.start, self.seconds, self.tiny = file, start, 60 * minutes, tiny
        self.device, self.dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.float16)
        self.backend = "eager" if tiny else "inductor"  # of torch.compile
        self.part, self.reserve = "", 0.0  # seconds that later parts need
        self.kept: dict[str, dict] = {"conditions": {}, "results": {}}

    def left(self) -> float:
        """Seconds left; `start` is on the clock of time.monotonic."""
        return self.start + self.seconds - time.monotonic()

    def log(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(self.kept, indent=1) + "\n")
        part.replace(self.file)

    def measure(self, name: str, need: float, body: Callable[[], dict], optional: bool = False) -> dict:
        """What `body` found, recorded with the seconds it took; `need` is about how many that is. An `optional` one leaves later parts their time."""
        begin, left = time.monotonic(), self.left()
        wanted = 0.0 if self.tiny else need + self.reserve * optional
        if self.tiny and optional:
            found = {"left out": "it repeats what is tested already"}
        elif left < wanted:
            found = {"left out": f"{max(0, left):.0f} s are left, about {wanted:.0f} are needed"}
        else:
            try:
                found = body()
            except Exception as error:  # the other measurements are still worth having
                found = {"failed": f"{type(error).__name__}: {error}"[:600]}
            found["seconds"] = round(time.monotonic() - begin, 1)
        try:  # what the measurement held is gone with its frame
            if self.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        except Exception as error:
            found["failed after it"] = str(error)[:200]
        self.keep(name, found)
        return found

    def keep(self, name: str, found: dict) -> None:
        """Record what was found."""
        self.kept["results"].setdefault(self.part, {})[name] = found
        self.write()
        short = {key: value for key, value in found.items() if not isinstance(value, (dict, list))}
        self.log(f"{self.part}: {name}: " + ", ".join(f"{k} {cell(v)}" for k, v in short.items())[:300])


class Case:
    """A network of full size with latents, timesteps and texts; calling it is one evaluation."""

    def __init__(self, bench: Bench, family: str, size: int, batch: int, channels_last: bool = False):
        self.size = SMALL[size] if bench.tiny else size
        task = make_task(family, self.size, 2, bench.dtype, bench.tiny, bench.device)
        told = list(task.conditioning.values())[:batch]
        self.net, self.conditioning = task.denoiser, type(told[0])(*(torch.cat(ts) for ts in zip(*told)))
        self.x = task.noise.to(bench.dtype).repeat(batch, 1, 1, 1)
        self.t = task.sampler.timesteps[:1].to(bench.device).repeat(batch)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> Tensor:
        return self.net(self.x, self.t, self.conditioning)

    def other_latents(self) -> None:
        """New values in the same tensor."""
        self.x.copy_(self.x.flip(-1) * 0.5)


def in_fp32(case: Case) -> Tensor:
    """The evaluation with the same weights in fp32, without TF32."""
    net, told = (
        copy.deepcopy(case.net).float(),
        type(case.conditioning)(*(t.float() for t in case.conditioning)),
    )
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return net(case.x.float(), case.t, told)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_call(call: Callable, cuda: bool, seconds: float = 0.8) -> dict[str, float]:
    """Milliseconds of a call: the median of its repeats, the least and the most; a third of `seconds` warms up."""
    synchronize()
    begin, calls = time.perf_counter(), 0
    if not cuda:  # a test, which is about everything else
        call()
        spent = 1000 * (time.perf_counter() - begin)
        return {"ms": spent, "least": spent, "most": spent, "repeats": 1}
    while calls < 2 or (time.perf_counter() - begin < seconds / 3 and calls < 200):
        call()
        torch.cuda.synchronize()
        calls += 1
    repeats = min(60, max(5, int(seconds * calls / (time.perf_counter() - begin))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    return {"ms": median(times), "least": min(times), "most": max(times), "repeats": repeats}


class Recording:
    """A CUDA graph of what `run` starts on fixed tensors: `replay` writes `result` anew. On the CPU a stand-in that calls `run`.

    The first passes are on a side stream: cuBLAS and cuDNN make their choices there. Recordings in one pool are not replayed at the same time.
    """

    def __init__(self, run: Callable[[], Tensor], cuda: bool, pool: object = None):
        self.run, self.graph, self.pool, self.pool_bytes = run, None, None, 0
        if not cuda:
            self.result = run()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = run()
        self.pool, self.pool_bytes = self.graph.pool(), torch.cuda.memory_reserved() - before

    def replay(self) -> None:
        if self.graph is None:
            self.result.copy_(self.run())
        else:
            self.graph.replay()


def graph_of(call: Callable[[], Tensor], other: Callable[[], None], cuda: bool) -> dict:
    """Milliseconds of a call as a graph, GiB of its pool and of a second graph's in the same, whether both have the call's bits on `other` values."""
    with peak(cuda) as memory:
        first = Recording(call, cuda)
        first.replay()
    second = Recording(call, cuda, first.pool)
    other()
    wanted, equal = call().clone(), True
    for recording in (first, second):  # one may write over the other's result
        recording.replay()
        equal = equal and torch.equal(recording.result, wanted)
    times = time_call(first.replay, cuda)
    return {
        "ms": times["ms"], "times": times, "equal": equal, "finite": bool(wanted.isfinite().all()), "peak GiB": memory.gib,
        "pool GiB": first.pool_bytes / GIB, "second GiB": second.pool_bytes / GIB,
    }  # fmt: skip


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in fp32."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def digest(tensor: Tensor) -> str:
    """The tensor's values as a short text: equal for equal bits only, also between processes."""
    raw = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


class peak:
    """`with peak(cuda) as memory: ...`; then `memory.gib` is the most that was allocated in it, None on the CPU."""

    def __init__(self, cuda: bool):
        self.cuda, self.gib = cuda, None

    def __enter__(self) -> "peak":
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda and error[0] is None:
            torch.cuda.synchronize()
            self.gib = torch.cuda.max_memory_allocated() / GIB


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations without matrix products read and write where none are fused: each its tensors once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func._overloadpacket not in flop_registry and "empty" not in func._schema.name:
            places = {t.untyped_storage().data_ptr() for t in given}
            if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in places for t in made):
                self.bytes += sum(
                    min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in [*given, *made]
                )
        return out


def count_work(call: Callable) -> dict[str, float]:
    """TFLOP of the matrix products of a call, and GB that all other operations move, unfused."""
    with torch.inference_mode(False), torch.no_grad():  # inference mode would hide what operations consist of
        with FlopCounterMode(display=False) as products, Traffic() as traffic:
            call()
    return {"TFLOP": products.get_total_flops() / 1e12, "unfused GB": traffic.bytes / 1e9}


def ceilings(bench: Bench) -> dict[str, float]:
    """TFLOP/s of a large matrix product of random numbers and TB/s of a large copy (bytes read and written), on this device."""
    cuda, side, count = bench.device == "cuda", 64 if bench.tiny else 8192, 2**16 if bench.tiny else 2**30
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = time_call(lambda: a @ b, cuda)["ms"]
    source = torch.randn(count, device=bench.device, dtype=bench.dtype)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), cuda)["ms"]
    return {"TFLOP/s": 2 * side**3 / product / 1e9, "TB/s": 2 * source.nbytes / copy / 1e9}


def roofline(work: dict[str, float], limits: dict[str, float]) -> float:
    """Milliseconds that the counted work takes at the ceilings: matrix products, then the other operations' unfused traffic."""
    return 1000 * work["TFLOP"] / limits["TFLOP/s"] + work["unfused GB"] / limits["TB/s"]


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, words in CLASSES.items() if any(word in name for word in words)), "other")


def profile(call: Callable, cuda: bool, top: int = 12) -> dict[str, object]:
    """Kernels of a call: milliseconds, the share of each class, and the `top` longest with share, calls and name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronize()
    times, calls = Counter(), Counter()
    for row in profiler.key_averages():
        on_device = row.device_type == torch.autograd.DeviceType.CUDA
        if (
            on_device != cuda
            or getattr(row, "is_user_annotation", False)
            or row.key.startswith(("## ", "Torch-"))
        ):
            continue
        name = (
            "self_cpu_time_total" if not cuda
            else "self_device_time_total" if hasattr(row, "self_device_time_total") else "self_cuda_time_total"
        )  # fmt: skip
        times[row.key] += getattr(row, name)
        calls[row.key] += row.count
    total, classes = sum(times.values()) or 1, Counter()
    for key, spent in times.items():
        classes[class_of(key)] += spent / total
    return {
        "kernels ms": total / 1000,
        "classes": {kind: round(share, 4) for kind, share in classes.most_common()},
        "kernels": [
            [round(spent / total, 4), calls[key], key[:120]] for key, spent in times.most_common(top)
        ],
    }


@contextmanager
def attention_first(backend: str | None) -> Iterator[None]:
    """Scaled dot-product attention prefers this back-end (of BACKENDS) and takes another where it does not serve; None: PyTorch's choice."""
    if backend is None:
        yield
        return
    order = [BACKENDS[backend], *(other for name, other in BACKENDS.items() if name != backend)]
    with sdpa_kernel(order, set_priority=True):
        yield


def no_compiler() -> str | None:
    """A sentence where there is no C compiler, which Triton needs."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "There is no C compiler here, which Triton needs: install gcc or set CC to one."


@contextmanager
def compiling() -> Iterator[None]:
    """torch.compile starts from nothing, with an empty cache on disk that is removed at the end; inductor measures nothing to choose kernels."""
    import torch._dynamo
    import torch._inductor.config as inductor
    import torch._inductor.utils as utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # every shape of every block is a compilation of its own, and all count as one function's
    limits = ("recompile_limit", "accumulated_recompile_limit")
    limits = {name: 512 for name in limits if hasattr(torch._dynamo.config, name)}
    chosen = {
        "deterministic": True,
        "max_autotune": False,
        "max_autotune_pointwise": False,
        "max_autotune_gemm": False,
    }
    chosen = {name: value for name, value in chosen.items() if hasattr(inductor, name)}
    empty = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache
    torch.backends.cudnn.benchmark = False
    try:
        with torch._dynamo.config.patch(limits), inductor.patch(chosen), empty():
            yield
    finally:
        torch._dynamo.reset()


def compile_blocks(net: nn.Module, kinds: Sequence[type], backend: str) -> int:
    """Each block of these classes compiles itself when it is first called, once a shape; returns how many there are."""
    blocks = [module for module in net.modules() if type(module) in kinds]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    return len(blocks)


def compiled_graphs() -> int:
    """How many graphs dynamo has compiled since its last reset."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def cell(value: object) -> str:
    """A value of a table in few characters."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return (
            "0"
            if value == 0
            else f"{value:.1e}"
            if abs(value) < 0.001
            else f"{value:.3f}"
            if abs(value) < 1
            else f"{value:.1f}"
        )
    return "" if value is None else str(value)


def show(kept: dict) -> str:
    """What a file of results holds: conditions, then a table of each part; times in ms."""
    lines = []
    for name, value in kept["conditions"].items():
        values = value.items() if isinstance(value, dict) else [(name, value)]
        lines.append("; ".join(f"{key} {cell(each)}" for key, each in values))
    lines = textwrap.wrap("; ".join(lines) + "; times in ms", WIDTH)
    for part, rows in kept["results"].items():
        keys = [key for key in COLUMNS if any(key in found for found in rows.values())]
        texts = [[cell(found.get(key)) for key in keys] for found in rows.values()]
        widths = [max(map(len, column)) for column in zip([COLUMNS[key] for key in keys], *texts)]
        room = WIDTH - sum(widths) - 2 * len(widths)
        lines += ["", f"{part:<{room}}" + "".join(f"  {COLUMNS[key]:>{w}}" for key, w in zip(keys, widths))]
        for (name, found), row in zip(rows.items(), texts):
            reason = next(
                (f"{key}: {found[key]}" for key in ("left out", "failed", "failed after it") if key in found),
                None,
            )
            if reason:
                lines += textwrap.wrap(f"{name}: {reason}", WIDTH)
                continue
            if len(name) > room:
                lines.append(name)
                name = ""
            lines.append(f"{name:<{room}}" + "".join(f"  {text:>{w}}" for text, w in zip(row, widths)))
        for name, found in rows.items():
            kernels = found if "classes" in found else found.get("profile", {})
            if "classes" in kernels:
                shares = ", ".join(f"{kind} {share:.1%}" for kind, share in kernels["classes"].items())
                lines += textwrap.wrap(f"{name}: {cell(kernels['kernels ms'])} ms: {shares}", WIDTH)
                lines += [f"  {s:6.1%} {calls:5} {kernel}"[:WIDTH] for s, calls, kernel in kernels["kernels"]]
    return "\n".join(lines)
