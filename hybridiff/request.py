"""What is asked for: one picture, every default filled in, every range checked.

The command line, the lines of a prompts file and Python all come through `make_request`. Its errors name arguments in backquotes; the
program shows these as options.
"""

import math
import secrets
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridiff.errors import UsageError, printable
from hybridiff.presets import PRESETS, paper_rule, usual_reuse
from hybridiff.samplers import SAMPLERS, TRAINING_STEPS
from hybridiff.strategies import STRATEGIES, Reuse
from hybridiff.switching import SwitchRule
from weights.files import FP8
from weights.load import Checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SKIPPING = ("step-extrapolation", "inner-reuse", "guided-pipeline")  # that `full_first` and `skipped` steer
LARGEST = 2**16  # pixels a side


@dataclass(frozen=True)
class Request:
    """One picture as asked for, every default filled in. Sizes in pixels."""

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    height: int
    width: int
    seed: int
    sampler: str | None
    strategy: str
    rule: SwitchRule
    dtype: torch.dtype
    tiles: bool = False  # decode in tiles if the picture is large
    reuse: Reuse = Reuse()  # which steps our strategies skip
    t5: str | None = "device"  # where and how T5 runs: "device", "cpu" or "fp8"; None where there is none
    balance: bool = False  # cut where the measured times of the units say


def make_request(
    checkpoint: Checkpoint,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    *,
    preset: str = "balanced",
    strategy: str | None = None,
    steps: int = 50,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    sampler: str | None = None,
    window: int | None = None,
    slope: float | None = None,
    cap: int | None = None,
    interval: int | None = None,
    full_first: int | None = None,
    skipped: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tiles: bool = False,
    t5: str = "device",
    balance: bool = False,
) -> Request:
    """A request; what is not given has the checkpoint's default, then its family's. A seed that is not given is drawn.

    `strategy` takes the place of the preset's; `window`, `slope`, `cap`, `interval` are the numbers of `paper` (default: the paper's, scaled
    from 50 steps), `full_first` and `skipped` those of the strategies that skip (default: the preset's share). UsageError, a ValueError,
    names the argument that is wrong. How a network and a number of ranks limit it is for `pipeline.plan_picture`.
    """
    model, defaults = checkpoint.model, checkpoint.defaults
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        check_text(f"`{name}`", text)
    if preset not in PRESETS:
        raise UsageError(f"`preset` {printable(str(preset))} is unknown: choose one of {', '.join(PRESETS)}.")
    strategy = strategy or PRESETS[preset].strategy
    if strategy not in STRATEGIES:
        raise UsageError(
            f"`strategy` {printable(strategy)} is unknown: choose one of {', '.join(STRATEGIES)}."
        )
    require_number("steps", steps, 1, TRAINING_STEPS - 1)
    rule_numbers: dict[str, Any] = {"window": window, "slope": slope, "cap": cap, "interval": interval}
    reuse_numbers = {"full_first": full_first, "skipped": skipped}
    for numbers, strategies in ((rule_numbers, ("paper",)), (reuse_numbers, SKIPPING)):
        for name, value in numbers.items():
            if value is not None and strategy not in strategies:
                raise UsageError(
                    f"`{name}` has no effect with strategy {strategy}: add `strategy` {strategies[0]}, or leave it out."
                )
    rule = paper_rule(model.switch, steps)
    rule = replace(rule, **{name: value for name, value in rule_numbers.items() if value is not None})
    for name, value, least in (
        ("window", rule.window, 2),
        ("slope", rule.slope, 0),
        ("cap", rule.cap, 1),
        ("interval", rule.interval, 0),
    ):
        require_number(name, value, least)
    usual = usual_reuse(steps, PRESETS[preset].share or PRESETS["balanced"].share, full_first)
    require_number("full_first", usual.start, 2)
    room = len(usual.choices(steps))
    if skipped is not None and skipped > room:
        kept = f"the first {usual.start} and the last {usual.end} of {steps} steps"
        raise UsageError(
            f"`skipped` {skipped} is out of range: give at most {room}, as {kept} are never skipped."
        )
    if skipped is not None:
        require_number("skipped", skipped, 0)

    def either(name: str, given: Any, fallback: Any) -> Any:
        return given if given is not None else defaults.get(name, fallback)

    guidance = either("guidance", guidance, model.guidance)
    require_number("guidance", guidance)
    if guidance <= 1 and negative_prompt:
        raise UsageError(
            f"`negative_prompt` has no effect with guidance {guidance:g}, as 1 or less means no guidance: leave it out, or give more `guidance`."
        )
    if strategy == "one-branch" and guidance > 1:
        raise UsageError(
            f"`strategy` one-branch leaves guidance out: give `guidance` 1 with it, not {guidance:g}."
        )
    if guidance <= 1:
        strategy = "one-branch"
    if balance and strategy == "one-branch":
        raise UsageError(
            f"`balance` has nothing to balance where guidance {guidance:g} is none: leave it out, or give more `guidance`."
        )
    height, width = (
        either(name, given, model.size[name]) for name, given in (("height", height), ("width", width))
    )
    check_size(checkpoint, height, width)
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"`seed` {seed} is out of range: give a number from 0 to 2**63 - 1.")
    check_t5(checkpoint, t5)
    return Request(
        prompt=either("prompt", prompt, ""),
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        sampler=sampler or next(iter(SAMPLERS[model.prediction])),
        strategy=strategy,
        rule=rule,
        dtype=known_dtype(dtype) if dtype else usual_dtype(checkpoint, torch.device(device)),
        tiles=tiles,
        t5=None if t5 == "device" and "t5" not in checkpoint.parts else t5,
        balance=balance,
        reuse=usual if skipped is None else replace(usual, count=skipped),
    )


def require_number(name: str, value: float, least: float | None = None, most: float | None = None) -> None:
    """UsageError unless a number is finite and in its range."""
    if not math.isfinite(value):
        raise UsageError(
            f"`{name}` {value} is not a finite number: give one, such as {'4e-4' if name == 'slope' else 5}."
        )
    if least is not None and value < least or most is not None and value > most:
        wanted = f"at least {least}" if most is None else f"a number from {least} to {most}"
        raise UsageError(f"`{name}` {printable(str(value), 20)} is out of range: give {wanted}.")


def check_text(name: str, text: str | None) -> None:
    """UsageError where a text has lone surrogates: bytes of the command line that are no UTF-8, or half of a pair in JSON."""
    for number, character in enumerate(text or "", 1):
        if "\ud800" <= character <= "\udfff":
            raise UsageError(
                f"{name} is no Unicode text at its character {number} (U+{ord(character):04X} alone): write it in UTF-8."
            )


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    """UsageError unless the networks can make a picture of this size."""
    denoiser, factor = checkpoint.config("denoiser"), checkpoint.config("vae").factor
    multiple = denoiser.multiple * factor
    largest = getattr(denoiser, "largest", None)
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise UsageError(
                f"`{name}` {side} does not fit this network: give a positive multiple of {multiple}."
            )
        if largest is not None and side > largest * factor:
            raise UsageError(
                f"`{name}` {side} is beyond this network's positions: give at most {largest * factor}."
            )
        if side > LARGEST:
            raise UsageError(f"`{name}` {side} is too large: give at most {LARGEST}.")


def check_t5(checkpoint: Checkpoint, t5: str) -> None:
    """UsageError unless T5 can run as asked for."""
    if t5 not in ("device", "cpu", "fp8"):
        raise UsageError(f"`t5` {printable(str(t5))} is unknown: choose one of device, cpu, fp8.")
    if t5 in ("cpu", "fp8") and "t5" not in checkpoint.parts:
        raise UsageError(f"`t5` {t5} says how T5 runs, and there is no T5 here: leave it out.")
    if t5 == "fp8" and checkpoint.dtype("t5") not in FP8:
        raise UsageError(
            "`t5` fp8 needs a T5 that is stored in fp8, and this one is not: leave it out or give `t5` cpu."
        )


def known_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """One of DTYPES, by name or as it is. UsageError where it is another."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UsageError(f"`dtype` {printable(str(dtype))} is unknown: choose one of {', '.join(DTYPES)}.")
    return found


def usual_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """fp32 on the CPU, where many are slow in anything else; on CUDA bf16 where the denoiser is stored in it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint.dtype("denoiser") == torch.bfloat16 else torch.float16


def in_words(request: Request) -> str:
    """The strategy with the numbers that it goes by."""
    rule, reuse = request.rule, request.reuse
    if request.strategy == "paper":
        return f"paper (window {rule.window}, slope {rule.slope:g}, cap {rule.cap}, interval {rule.interval})"
    if request.strategy == "one-branch":
        return f"one-branch (guidance {request.guidance:g} is none: there is nothing to split)"
    if request.strategy not in SKIPPING:
        return request.strategy
    consecutive = request.strategy == "guided-pipeline"
    steps = reuse.consecutive(request.steps) if consecutive else reuse.spread(request.steps)
    return f"{request.strategy} ({len(steps)} of {request.steps} steps skipped, never the first {reuse.start} or the last {reuse.end})"
