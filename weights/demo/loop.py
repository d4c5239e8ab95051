"""The training loop that the autoencoders and the denoisers share: AdamW, EMA, a state on disk that a kill cannot hurt.

All randomness of a step comes from a generator seeded with the step's number, so a resumed run sees the same batches.
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """Length and step size of a run: linear warm-up, then cosine decay to 2% of the rate at the last step."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    ema: float = 0.999
    report_every: int = 50
    save_seconds: float = 180.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes beside the path and renames, so that the file is always either the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def half_precision(device: torch.device) -> AbstractContextManager:
    """bf16 matrix products on a GPU. On a CPU they pay only with AMX: AVX512 alone did a third fewer steps than in fp32."""
    slow = device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=not slow)


def record(path: Path) -> dict[str, object]:
    """What the state file of a run tells: steps, minutes and the curve of its loss."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    return {"steps": int(told["step"]), "minutes": round(float(told["seconds"]) / 60, 1), "loss": json.loads(told["curve"])}


class Run:
    """A model in training: its weights, their moving average, the optimizer, the number of steps done."""

    def __init__(self, model: nn.Module, plan: Plan, state_file: Path):
        self.model, self.plan, self.state_file = model, plan, state_file
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.trained.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step, self.seconds, self.loss = 0, 0.0, math.nan  # loss: mean since the last report
        self.curve: list[list[float]] = []  # [step, loss] at every report
        if state_file.exists():
            self._load()

    def _load(self) -> None:
        tensors, metadata = read_safetensors(self.state_file)
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.loss, self.curve = float(metadata["loss"]), json.loads(metadata["curve"])
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.optimizer.state[weight] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"moment1.{name}"].to(weight.device),
                    "exp_avg_sq": tensors[f"moment2.{name}"].to(weight.device),
                }
        print(f"resumed {self.state_file.name} at step {self.step}", flush=True)

    def save(self) -> None:
        """Writes weights, average, both moments and the step."""
        tensors = {}
        for name, weight in self.trained.items():
            moments = self.optimizer.state[weight]
            tensors |= {f"model.{name}": weight.detach(), f"average.{name}": self.average[name],
                        f"moment1.{name}": moments["exp_avg"], f"moment2.{name}": moments["exp_avg_sq"]}
        numbers = {"step": self.step, "seconds": self.seconds, "loss": self.loss, "curve": self.curve}
        write_safetensors(tensors, self.state_file, {key: str(value) for key, value in numbers.items()})

    def use_average(self) -> None:
        """Puts the moving average into the model (for sampling and export; not to be trained on)."""
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self.average[name])

    def fit(self, loss_of: Callable[[torch.Generator, int], Tensor], show: Callable[[], None] | None = None,
            show_every: int = 500) -> None:
        """Trains to the end of the plan; `loss_of(generator, step)` draws the batch, `show` runs on the average."""
        started, saved, reported = (time.monotonic(),) * 3
        losses: list[float] = []
        before = self.seconds
        while self.step < self.plan.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate_at(self.step)
            loss = loss_of(torch.Generator().manual_seed(self.step), self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimizer.step()
            decay = min(self.plan.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - decay)
            losses.append(loss.detach())
            self.step += 1
            done, now = self.step == self.plan.steps, time.monotonic()
            self.seconds = before + now - started
            if self.step % self.plan.report_every == 0 or done:
                self.loss = torch.stack(losses).mean().item()
                self.curve.append([self.step, round(self.loss, 5)])
                speed = len(losses) / (now - reported)
                left = (self.plan.steps - self.step) / speed / 60
                print(f"{self.state_file.stem} step {self.step}/{self.plan.steps} loss {self.loss:.5f} "
                      f"{speed:.2f} steps/s, {left:.0f} min left", flush=True)
                losses, reported = [], now
            if now - saved > self.plan.save_seconds or done:
                self.save()
                saved = now
            if show and (self.step % show_every == 0 or done):
                kept = {name: weight.detach().clone() for name, weight in self.trained.items()}
                self.use_average()
                show()
                with torch.no_grad():
                    for name, weight in self.trained.items():
                        weight.copy_(kept[name])
