"""Which kernels to use on a GPU: `python benchmarks/gpu.py --json FILE`. One run of 8 minutes measures both networks at full size, fp16, random weights.

Parts, in this order: `graphs` (each evaluation as Python runs it and as a CUDA graph; channels_last; PyTorch's rms_norm), `attention` (back-ends of
scaled_dot_product_attention), `sd3-compile` and `sdxl-compile` (blocks compiled by inductor, inside a graph), `decode` (the autoencoder's dtypes), `diffusers` (its
networks of the same sizes). A part for which the time does not suffice is left out. FILE is written after every measurement, and `--show` prints it.

An evaluation is one call of a whole network. Bits are compared on other latents than those that were recorded.
"""

import time

START = time.monotonic()  # before the imports, which count too

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.common import FAMILIES, in_words, machine  # noqa: E402
from benchmarks.timing.gpu_tools import (  # noqa: E402
    BACKENDS,
    SMALL,
    Bench,
    Case,
    Recording,
    attention_first,
    ceilings,
    compile_blocks,
    compiled_graphs,
    compiling,
    count_work,
    digest,
    graph_of,
    in_fp32,
    no_compiler,
    peak,
    profile,
    relative_error,
    roofline,
    show,
    synchronize,
    time_call,
)  # fmt: skip
from hybridiff.app.report.page import psnr  # noqa: E402
from models.autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from models.mmdit import JointBlock, MMDiT, RMSNorm  # noqa: E402
from models.unet import ResBlock, TransformerBlock  # noqa: E402
from tests.full_size import FACTOR, FULL, SEED, TINY, TOKENS, fill, texts  # noqa: E402

REPEATED = {"sdxl": (ResBlock, TransformerBlock), "sd3": (JointBlock,)}  # the blocks that are compiled
THEIRS = {"sdxl": ["BasicTransformerBlock"], "sd3": ["JointTransformerBlock"]}  # of diffusers
GOALS = {("sdxl", 1): 21, ("sdxl", 2): 37, ("sd3", 1): 21, ("sd3", 2): 42}  # ms at 1024, compiled, H200
SIZES = ((512, 1), (1024, 1), (1024, 2), (2048, 1))  # pixels a side and batch
AT_LEAST = {  # seconds without which a part does not start
    "graphs": 60, "attention": 40, "sd3-compile": 75, "sdxl-compile": 150, "decode": 20, "diffusers": 40,
}  # fmt: skip


def eager_and_graph(bench: Bench, make: Callable[[], Case]) -> dict:
    """One evaluation as Python runs it, and as a graph; against the ceilings."""
    cuda, case = bench.device == "cuda", make()
    case()
    with peak(cuda) as memory:
        case()
    eager = time_call(case, cuda)
    graph = graph_of(case, case.other_latents, cuda)
    work = count_work(case)
    floor = roofline(work, bench.kept["conditions"]["ceilings"])
    return {
        "eager ms": eager["ms"], "graph ms": graph["ms"], "equal": graph["equal"], "finite": graph["finite"],
        "eager GiB": memory.gib, "graph GiB": graph["peak GiB"], "pool GiB": graph["pool GiB"], "second GiB": graph["second GiB"],
        "floor ms": floor, "share": floor / graph["ms"], "digest": digest(case()), **work, "times": {"eager": eager, "graph": graph["times"]},
    }  # fmt: skip


class WeightOutside(nn.RMSNorm):
    """F.rms_norm without its weight, which multiplies the result in the input's dtype, as in models.mmdit.RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


def normalised(bench: Bench, kind: type[nn.RMSNorm] | None) -> Case:
    """SD3 with normalised queries and keys, as SD3.5 has them: by our own RMSNorm or another kind."""
    case = Case(bench, "sd3", 1024, 1)
    with torch.device("meta"):
        net = MMDiT(replace(case.net.config, qk_norm=True))
        for module in list(net.modules()) if kind else []:
            for name, child in list(module.named_children()):
                if isinstance(child, RMSNorm):
                    setattr(module, name, kind(child.weight.shape[0], eps=1e-6))
    case.net = net.to(bench.dtype).eval().requires_grad_(False).to_empty(device=bench.device)
    fill(case.net)
    return case


def graphs(bench: Bench) -> None:
    """Both networks at all sizes, then what else an eager network can be."""
    for size, batch in SIZES[2:3] if bench.tiny else SIZES:
        for family in FAMILIES:
            make = partial(Case, bench, family, size, batch)
            bench.measure(f"{family} {size} batch {batch}", 12, partial(eager_and_graph, bench, make))
    for batch in (1, 2):
        make = partial(Case, bench, "sdxl", 1024, batch, channels_last=True)
        name, body = f"sdxl 1024 batch {batch} channels_last", partial(eager_and_graph, bench, make)
        bench.measure(name, 12, body, batch == 2)
    for name, kind in {"own": None, "F.rms_norm": nn.RMSNorm, "weight outside": WeightOutside}.items():
        make = partial(normalised, bench, kind)
        bench.measure(f"sd3 1024 batch 1 norms: {name}", 12, partial(eager_and_graph, bench, make))
    for family in FAMILIES:
        case = partial(Case, bench, family, 1024, 1)
        bench.measure(f"{family} 1024 kernels", 12, lambda case=case: profile(case(), bench.device == "cuda"))


def shapes(family: str, config: object, size: int) -> dict[str, tuple[int, int, int, int]]:
    """Every attention in a network: how often -> (heads, queries, keys, width of a head)."""
    side, text, found = size // FACTOR, TOKENS[family], {}
    if family == "sd3":
        tokens = (side // config.patch) ** 2 + text
        return {f"joint, x{config.depth}": (config.heads, tokens, tokens, config.width // config.heads)}
    for level, depth in enumerate(config.depths):
        last = level == len(config.depths) - 1
        times = depth * (2 * config.blocks + 1) + (config.middle_depth if last else 0)
        if depth:
            tokens, heads = (side // 2**level) ** 2, config.heads[level]
            width = config.channels * config.multipliers[level] // heads
            found[f"self, level {level}, x{times}"] = heads, tokens, tokens, width
            found[f"text, level {level}, x{times}"] = heads, tokens, text, width
    return found


def time_backends(bench: Bench, heads: int, queries: int, keys: int, width: int, batch: int = 1) -> dict:
    """Milliseconds of one attention by each back-end alone, and relative errors to fp32. Ten of them are one graph."""
    cuda = bench.device == "cuda"
    generator = torch.Generator(bench.device).manual_seed(SEED)
    # as a projection leaves them: (B, N, heads * width), seen as (B, heads, N, width)
    q, k, v = (
        torch.randn(batch, n, heads * width, device=bench.device, dtype=bench.dtype, generator=generator)
        .unflatten(-1, (heads, width)).transpose(1, 2) for n in (queries, keys, keys)
    )  # fmt: skip
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    choice = int(torch._fused_sdp_choice(q, k, v)) if hasattr(torch, "_fused_sdp_choice") else None
    chosen = [name for name, backend in BACKENDS.items() if backend.value == choice]
    found: dict = {"PyTorch takes": chosen[0] if chosen else "?", "errors": {}, "unavailable": {}}
    for name, backend in BACKENDS.items():
        if name == "math" and 4 * batch * heads * queries * keys > 2**31:
            continue  # it would hold all scores
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                recording = Recording(
                    lambda: [F.scaled_dot_product_attention(q, k, v) for _ in range(10)][-1], cuda
                )
                found[f"{name} ms"] = time_call(recording.replay, cuda, 0.2)["ms"] / 10
            found["errors"][name] = relative_error(recording.result, exact)
        except Exception as error:
            found["unavailable"][name] = str(error)[:200]
    return found


def by_backend(bench: Bench, family: str, size: int) -> dict:
    """Milliseconds of a whole evaluation as a graph with each back-end first, and relative errors to PyTorch's own choice."""
    case, cuda = Case(bench, family, size, 1), bench.device == "cuda"
    wanted, found = case().clone(), {"errors": {}, "unavailable": {}}
    for name in (None, *(name for name in BACKENDS if name != "math")):
        try:
            with attention_first(name):
                found["errors"][name or "PyTorch's"] = relative_error(case(), wanted)
                recording = Recording(case, cuda)
                found[f"{name or 'chosen'} ms"] = time_call(recording.replay, cuda, 0.5)["ms"]
            del recording
        except Exception as error:
            found["unavailable"][name or "PyTorch's"] = str(error)[:200]
    return found


def attention(bench: Bench) -> None:
    """Each attention of both networks alone, then whole networks."""
    for size in (1024,) if bench.tiny else (1024, 2048):
        for family in FAMILIES:
            small = SMALL[size] if bench.tiny else size
            config = (TINY if bench.tiny else FULL)[family]
            for name, shape in shapes(family, config, small).items():
                text = f"{family} {size} {name}: {shape[0]} heads, {shape[1]} x {shape[2]}"
                bench.measure(text, 5, partial(time_backends, bench, *shape))
            bench.measure(f"{family} {size} whole network", 12, partial(by_backend, bench, family, size))


def compiled(
    bench: Bench, family: str, batch: int = 1, last: bool = False, first: str | None = None, whole: bool = False,
    details: bool = False
) -> dict:  # fmt: skip
    """A network at 1024, compiled by blocks or as a `whole`: seconds of compilation, milliseconds as Python runs it and as a graph, bits of two calls.

    `last`: channels_last; `first`: the back-end of attention to prefer; `details`: errors to fp32 and kernels too.
    """
    case, cuda = Case(bench, family, 1024, batch, channels_last=last), bench.device == "cuda"
    eager, work = case().clone(), count_work(case)
    exact = in_fp32(case) if details else None
    with compiling(), attention_first(first):
        begin = time.perf_counter()
        if whole:
            case.net.compile(fullgraph=True, dynamic=False, backend=bench.backend)
        else:
            compile_blocks(case.net, REPEATED[family], bench.backend)
        result = case().clone()
        synchronize()
        found = {"compile s": time.perf_counter() - begin, "compiled": compiled_graphs()}
        if not found["compiled"]:
            raise RuntimeError("nothing was compiled: are these still the blocks that the network calls?")
        twice, direct = torch.equal(case(), result), time_call(case, cuda, 0.5)
        found |= {"error": relative_error(result, eager), "digest": digest(result), "attention first": first}
        graph = graph_of(case, case.other_latents, cuda)
        floor = roofline(work, bench.kept["conditions"]["ceilings"])
        found |= {
            "direct ms": direct["ms"], "graph ms": graph["ms"], "goal ms": GOALS[family, batch],
            "equal": twice and graph["equal"], "finite": graph["finite"], "graph GiB": graph["peak GiB"],
            "share": floor / graph["ms"], "times": {"direct": direct, "graph": graph["times"]},
        }  # fmt: skip
        if exact is not None:
            found |= {"error to fp32": relative_error(result, exact), "eager's": relative_error(eager, exact)}
            try:
                found["profile"] = profile(case, cuda)
            except Exception as error:
                found["profile"] = {"error": str(error)[:200]}
    return found


def compiled_with_fastest(bench: Bench, family: str, last: bool) -> dict:
    """`compiled` with that back-end of attention first which is the fastest for the family's largest attention."""
    config, size = (TINY[family], SMALL[1024]) if bench.tiny else (FULL[family], 1024)
    every = shapes(family, config, size).values()
    found = time_backends(bench, *max(every, key=lambda s: s[0] * s[1] * s[2]))
    taken = {name: found[f"{name} ms"] for name in BACKENDS if f"{name} ms" in found}
    name = min(taken, key=taken.get) if taken else None
    if name in (None, found["PyTorch takes"]):
        return {"left out": f"PyTorch's own choice, {name}, is the fastest for the largest attention"}
    return compiled(bench, family, last=last, first=name)


def compile_part(bench: Bench, family: str) -> None:
    """Batch 1 first, for the U-Net also in channels_last; then, in the faster layout, a batch of two, the same again, and what else fits in the time."""
    if not bench.tiny and (sentence := no_compiler()):
        bench.keep("blocks", {"left out": sentence})
        return
    need, last = (80.0 if family == "sdxl" else 40.0), False

    def row(name: str, body: Callable[[], dict], optional: bool = False) -> dict:
        nonlocal need
        found = bench.measure(name, need, body, optional)
        if "graph ms" in found:
            need = max(10.0, 1.2 * found["seconds"])
        return found

    first = row("blocks, batch 1", partial(compiled, bench, family, details=True))
    if family == "sdxl":
        body = partial(compiled, bench, family, last=True, details=True)
        other = row("blocks, batch 1, channels_last", body, bench.tiny)
        if other.get("graph ms", float("inf")) < first.get("graph ms", float("inf")):
            first, last = other, True
    how = ", channels_last" if last else ""
    row(f"blocks, batch 2{how}", partial(compiled, bench, family, batch=2, last=last), True)
    again = row(
        f"blocks, batch 1{how}, again",
        partial(compiled, bench, family, last=last),
        family == "sdxl" or not bench.tiny,
    )
    if "digest" in first and "digest" in again:
        again["equal to the first"] = again["digest"] == first["digest"]
        bench.write()
    row(f"blocks, batch 1{how}, fastest attention", partial(compiled_with_fastest, bench, family, last), True)
    need *= 2  # for one large graph
    row(f"whole network, batch 1{how}", partial(compiled, bench, family, last=last, whole=True), True)


def decode(bench: Bench) -> None:
    """The decoder of SDXL's autoencoder at 1024; the random weights do not overflow in fp16, as the official ones do."""
    cuda, side = bench.device == "cuda", SMALL[512] if bench.tiny else 1024
    config = AutoencoderConfig(channels=16, groups=8) if bench.tiny else AutoencoderConfig()
    coarse = torch.randn(1, config.latent_channels, 6, 6, generator=torch.Generator().manual_seed(SEED))
    smooth = F.interpolate(coarse, (side // FACTOR, side // FACTOR), mode="bicubic").to(bench.device)
    pictures: dict[str, Tensor] = {}

    def body(name: str, dtype: torch.dtype, tf32: bool, last: bool) -> dict:
        with torch.device("meta"):
            vae = Autoencoder(config)
        vae = vae.eval().requires_grad_(False).to_empty(device=bench.device)
        fill(vae)
        vae = vae.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)
        latents = smooth.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
        try:
            vae.decode(latents)
            with peak(cuda) as memory:
                image = vae.decode(latents)[0].float()
            times = time_call(lambda: vae.decode(latents), cuda, 0.5)
        finally:
            torch.backends.cudnn.allow_tf32 = before
        pictures[name] = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu()
        finite = bool(image.isfinite().all())
        found = {"ms": times["ms"], "peak GiB": memory.gib, "finite": finite, "times": times}
        if "fp32 without TF32" in pictures and name != "fp32 without TF32":
            found["PSNR"] = psnr(pictures[name], pictures["fp32 without TF32"])  # None: equal
        return found

    for last in (False, True):
        for name, dtype, tf32 in (
            ("fp32 without TF32", torch.float32, False), ("fp32, convolutions in TF32", torch.float32, True),
            ("bf16", torch.bfloat16, True), ("fp16", torch.float16, True),
        ):  # fmt: skip
            name += ", channels_last" if last else ""
            bench.measure(name, 4, partial(body, name, dtype, tf32, last))


def theirs(bench: Bench, family: str, compile: bool) -> dict:
    """diffusers' network of the same sizes at 1024, random weights: milliseconds as Python runs it and as a graph."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    from benchmarks.timing.diffusers_loop import mmdit_sizes, unet_sizes

    case, cuda = Case(bench, family, 1024, 1), bench.device == "cuda"
    kind, sizes = SD3Transformer2DModel, mmdit_sizes
    if family == "sdxl":
        kind, sizes = UNet2DConditionModel, unet_sizes
    config = case.net.config
    with torch.device("meta"):
        net = kind(sample_size=case.size // FACTOR, **sizes(config)).to(bench.dtype)
    case.net = net = net.eval().requires_grad_(False).to_empty(device=bench.device)
    fill(net)
    text, pooled = (t.to(bench.device) for t in texts(family, config, case.size, bench.dtype)["cond"])
    side = case.size
    added = torch.tensor([[side, side, 0, 0, side, side]], device=bench.device, dtype=bench.dtype)

    def call() -> Tensor:
        if family == "sdxl":
            more = {"text_embeds": pooled, "time_ids": added}
            return net(case.x, case.t, text, added_cond_kwargs=more, return_dict=False)[0]
        return net(case.x, text, pooled, case.t, return_dict=False)[0]

    with compiling() if compile else nullcontext():
        begin = time.perf_counter()
        if compile:
            net._repeated_blocks = THEIRS[family]  # SD3's class does not name its own
            net.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=bench.backend)
        call()
        synchronize()
        found = {"compile s": time.perf_counter() - begin} if compile else {}
        times = time_call(call, cuda)
        found |= {"direct ms": times["ms"], "times": times}
        try:
            graph = graph_of(call, case.other_latents, cuda)
            found |= {"graph ms": graph["ms"], "equal": graph["equal"], "graph GiB": graph["peak GiB"]}
        except Exception as error:  # theirs may not be made to be recorded
            found["graph failed"] = str(error)[:200]
    return found


def diffusers(bench: Bench) -> None:
    """Their networks as they are, then with compiled blocks."""
    try:
        import diffusers as package
    except ImportError:
        bench.keep("networks", {"left out": "diffusers is not installed here"})
        return
    bench.kept["conditions"]["diffusers"] = package.__version__
    for compile in (False, True):
        for family in FAMILIES:
            name = f"{family} 1024 batch 1" + (", blocks compiled" if compile else "")
            body, need = partial(theirs, bench, family, compile), 45 if compile else 10
            bench.measure(name, need, body, compile and family == "sdxl")


PARTS: dict[str, Callable[[Bench], None]] = {
    "graphs": graphs, "attention": attention, "sd3-compile": partial(compile_part, family="sd3"),
    "sdxl-compile": partial(compile_part, family="sdxl"), "decode": decode, "diffusers": diffusers,
}  # fmt: skip


def conditions(bench: Bench) -> dict[str, object]:
    """Card, versions and ceilings."""
    found: dict[str, object] = {"card": "none: tiny networks on the CPU, a stand-in for graphs"}
    if bench.device == "cuda":
        try:
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            driver = "unknown"
        found = {
            "card": torch.cuda.get_device_name(), "CUDA": torch.version.cuda, "driver": driver,
            "cuDNN": torch.backends.cudnn.version(), "memory of the card GiB": round(torch.cuda.mem_get_info()[1] / 2**30, 1),
        }  # fmt: skip
    return found | machine() | {"dtype": str(bench.dtype).split(".")[1], "ceilings": ceilings(bench)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", required=True, help="of the results; with --show they are there")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; they come in this order")
    add("--minutes", type=float, default=8, help="time for everything, imports included")
    add("--tiny", action="store_true", help="test this script: small networks on the CPU with stand-ins")
    add("--show", action="store_true", help="measure nothing, print what FILE holds")
    args = parser.parse_args()
    if args.show:
        if not args.json.is_file():
            parser.error("--show: --json must name a file that this script wrote.")
        print(show(json.loads(args.json.read_text())))
        return 0
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny tests the script on the CPU.")
    if args.tiny:
        torch.set_num_threads(1)
    bench = Bench(args.json, START, args.minutes, args.tiny)
    wanted = [part for part in PARTS if part in args.only]
    needs = dict.fromkeys(PARTS, 1) if args.tiny else AT_LEAST
    if find_spec("diffusers") is None:
        needs = needs | {"diffusers": 1}
    with torch.inference_mode():
        bench.kept["conditions"] = conditions(bench)
        bench.log(in_words(bench.kept["conditions"]))
        for number, part in enumerate(wanted):
            bench.part, bench.reserve = part, sum(needs[later] for later in wanted[number + 1 :])
            if bench.left() < needs[part]:
                text = f"{max(0, bench.left()):.0f} s are left, it needs at least {needs[part]}"
                bench.keep("everything", {"left out": text})
                continue
            try:
                PARTS[part](bench)
            except Exception as error:  # outside its measurements: the next part may still work
                bench.keep("everything", {"failed": f"{type(error).__name__}: {error}"[:600]})
    print("\n" + show(bench.kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
