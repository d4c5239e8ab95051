"""The training loop that the autoencoders and the denoisers share: AdamW and Muon, EMA, a state on disk that a kill cannot hurt.

All randomness of a step comes from a generator seeded with the step's number, so a resumed run sees the same batches. A state tells
its plan and what was there before it; another run's is refused.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hybridiff.app.files import write_whole


@dataclass(frozen=True)
class Plan:
    """Length and step size of a run: linear warm-up, then cosine decay to 2% of the rate at the last step."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    muon: float = 0.0  # times the rate, for the matrices in an MMDiT's blocks by Muon; 0: AdamW for them too
    ema: float = 0.999
    bf16: bool = True  # products of matrices in it where that pays (`bf16_pays`); else fp32
    report_every: int = 50
    save_seconds: float = 180.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The file is always either the old one or the new one, whole."""
    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: temporary.write_bytes(save(on_cpu, metadata)))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def digest(*files: Path) -> str:
    """Of the files' contents, 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[
        :16
    ]


@cache
def bf16_pays(device: torch.device) -> bool:
    """Whether products of bf16 matrices are faster than of fp32 ones: on a GPU yes, on a CPU measured (some have the instructions
    and are slower with them)."""
    if device.type != "cpu":
        return True
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        square, taken = torch.ones(512, 512, dtype=dtype), []
        for _ in range(4):
            started = time.perf_counter()
            square @ square
            taken.append(time.perf_counter() - started)
        seconds[dtype] = min(taken)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def record(path: Path) -> dict[str, object]:
    """What the state file of a run tells: steps, minutes, how it was made (by the process that saved last) and the curve of its loss."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    made = json.loads(told["made with"])
    return {
        "steps": int(told["step"]),
        "minutes": round(float(told["seconds"]) / 60, 1),
        **made,
        "loss": json.loads(told["curve"]),
    }


def hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix of an MMDiT's block that maps features to features; the modulations begin at zero and keep AdamW."""
    return "joint_blocks." in name and weight.ndim == 2 and "adaLN_modulation" not in name


class Run:
    """A model in training: its weights, their moving average, the optimizer, the number of steps done.

    `source`: the `digest` of the files that it begins with; `compiled`: whether the networks are, for the record alone. A state file of another
    source, plan or model ends the program with a sentence.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, state_file: Path, source: str = "", compiled: bool = False
    ):
        self.model, self.plan, self.state_file = model, plan, state_file
        self.kind = {"source": source} | {
            name: value
            for name, value in asdict(plan).items()
            if name not in ("report_every", "save_seconds")
        }
        self.device = next(model.parameters()).device
        self.made_with = {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "compiled": compiled,
        }
        self.made_with["bf16"] = plan.bf16 and bf16_pays(self.device)
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.trained.items()}
        self.of_muon = {
            name for name, weight in self.trained.items() if plan.muon and hidden_matrix(name, weight)
        }
        others = [weight for name, weight in self.trained.items() if name not in self.of_muon]
        self.optimizers = [
            torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        ]
        if self.of_muon:
            matrices = [self.trained[name] for name in self.of_muon]
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=plan.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        self.step, self.seconds, self.loss = 0, 0.0, math.nan  # loss: mean since the last report
        self.curve: list[list[float]] = []  # [step, loss] at every report
        if state_file.exists():
            self._load()

    def _moments(self, name: str) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
        """The optimizer of a weight and the names of what it remembers of it."""
        return (
            (self.optimizers[1], ("momentum_buffer",))
            if name in self.of_muon
            else (self.optimizers[0], ("exp_avg", "exp_avg_sq"))
        )

    def half_precision(self) -> AbstractContextManager:
        """bf16 matrix products where the plan has them and they pay; in a resumed run where they did at first."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.made_with["bf16"])

    def _load(self) -> None:
        tensors, metadata = read_safetensors(self.state_file)
        there, asked = json.loads(metadata.get("kind", "{}")), self.kind
        if differs := [name for name in asked if there.get(name) != asked[name]]:
            told = ", ".join(
                f"{name} {there.get(name, 'unknown')} instead of {asked[name]}" for name in differs
            )
            raise SystemExit(
                f"{self.state_file} is the state of another run ({told}): give another --out, or delete it."
            )
        shapes = {name: weight.shape for name, weight in self.trained.items()}
        if shapes != {
            name.removeprefix("model."): tensor.shape
            for name, tensor in tensors.items()
            if name.startswith("model.")
        }:
            raise SystemExit(
                f"{self.state_file} is the state of another network: give another --out, or delete it."
            )
        self.made_with["bf16"] = json.loads(metadata["made with"])["bf16"]
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.loss, self.curve = float(metadata["loss"]), json.loads(metadata["curve"])
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                optimizer, keys = self._moments(name)
                moments = {key: tensors[f"{key}.{name}"].to(weight.device) for key in keys}
                optimizer.state[weight] = moments | {
                    "step": torch.tensor(float(self.step), device=weight.device)
                }  # which Muon does not ask for
        print(f"resumed {self.state_file.name} at step {self.step}", flush=True)

    def save(self) -> None:
        """Writes weights, average, moments and the step."""
        tensors = {}
        for name, weight in self.trained.items():
            optimizer, keys = self._moments(name)
            tensors |= {
                f"model.{name}": weight.detach(),
                f"average.{name}": self.average[name],
                **{f"{key}.{name}": optimizer.state[weight][key] for key in keys},
            }
        told = {
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "curve": self.curve,
            "kind": self.kind,
            "made with": self.made_with,
        }
        write_safetensors(tensors, self.state_file, {key: json.dumps(value) for key, value in told.items()})

    def use_average(self) -> None:
        """Puts the moving average into the model (for sampling and export; not to be trained on)."""
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self.average[name])

    def fit(
        self,
        loss_of: Callable[[torch.Generator, int], Tensor],
        show: Callable[[], None] | None = None,
        show_every: int = 500,
    ) -> None:
        """Trains to the end of the plan; `loss_of(generator, step)` draws the batch, `show` runs on the average. States are saved after a report, and
        after `show`, so that a resumed run reports and shows what one without a kill does."""
        started, saved, reported = (time.monotonic(),) * 3
        losses: list[float] = []
        before = self.seconds
        while self.step < self.plan.steps:
            for optimizer, times in zip(self.optimizers, (1.0, self.plan.muon)):
                optimizer.param_groups[0]["lr"] = times * self.plan.rate_at(self.step)
            loss = loss_of(torch.Generator().manual_seed(self.step), self.step)
            self.model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - decay)
            losses.append(loss.detach())
            self.step += 1
            done, now = self.step == self.plan.steps, time.monotonic()
            self.seconds = before + now - started
            if self.step % self.plan.report_every == 0 or done:
                self.loss = torch.stack(losses).mean().item()
                if not math.isfinite(self.loss):
                    raise SystemExit(
                        f"{self.state_file.stem}: the loss is {self.loss} at step {self.step}; the state before it is kept."
                    )
                self.curve.append([self.step, round(self.loss, 5)])
                speed = len(losses) / (now - reported)
                left = (self.plan.steps - self.step) / speed / 60
                print(
                    f"{self.state_file.stem} step {self.step}/{self.plan.steps} loss {self.loss:.5f} "
                    f"{speed:.2f} steps/s, {left:.0f} min left",
                    flush=True,
                )
                if show and (self.step % show_every == 0 or done):
                    kept = {name: weight.detach().clone() for name, weight in self.trained.items()}
                    self.use_average()
                    show()
                    with torch.no_grad():
                        for name, weight in self.trained.items():
                            weight.copy_(kept[name])
                if now - saved > self.plan.save_seconds or done:
                    self.save()
                    saved = now
                losses, reported = [], time.monotonic()
