"""Replays recorded runs of the released code and compares every step: `python benchmarks/replay.py DIR`.

A recording is NAME.hybrid.json (two ranks, the three stages) or NAME.serial.json (one process), and the safetensors
file of the same name beside it: settings, inputs, latents after every step. The JSON names its model, MODEL.safetensors
and MODEL.config.json in the same folder, in Hugging Face naming. One process plays all ranks, in fp32 on the CPU.
Exit status: 0 if all agree, 1 if one does not or there is none, 2 if DIR is no folder.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hybridiff.denoise import Task, denoise  # noqa: E402
from hybridiff.distributed.transport import LocalTransport  # noqa: E402
from hybridiff.errors import UsageError  # noqa: E402
from hybridiff.samplers import FlowEuler, Sampler, make_sampler  # noqa: E402
from hybridiff.strategies import STRATEGIES, Settings  # noqa: E402
from hybridiff.switching import SwitchRule, find_switch  # noqa: E402
from models import family_of  # noqa: E402
from models.embeddings import sinusoid  # noqa: E402
from models.mmdit import MMDiTConditioning  # noqa: E402
from models.unet import UNetConditioning  # noqa: E402
from weights.load import WeightsError, open_checkpoint  # noqa: E402

LIMIT = 1e-4  # relative; rounding gives 2e-6, features one step too fresh 4.8e-4
FOLDERS = {"sdxl": "unet", "sd3": "transformer"}  # of the denoiser in Hugging Face layout


@dataclass(frozen=True)
class Recording:
    """One recorded run: the JSON file, and the tensors beside it."""

    path: Path
    facts: dict
    tensors: dict[str, Tensor]

    @property
    def hybrid(self) -> bool:
        """Whether two ranks made it, with strategy `paper`; else one process did."""
        return self.path.name.endswith(".hybrid.json")

    @property
    def frozen(self) -> bool:
        """Whether it uses the released SD3 boundary, off by one: every pipelined step but the filling one does."""
        patch = str(self.facts.get("reference_patch") or "").lower()
        mended = "boundary" in patch or "comm_index" in patch
        used = self.pipelined is None or len(self.pipelined) > 1
        return self.hybrid and self.facts["model_kind"] == "sd3" and not mended and used

    @property
    def pipelined(self) -> list[int] | None:
        """The steps of the parallelism stage, the filling one included; None where the recording does not tell."""
        steps = self.facts.get("pp_steps")
        if steps is None:
            return [] if self.facts.get("tau1") is None else None
        return [step for step in steps if step < self.facts["num_inference_steps"]]


def load_denoiser(folder: Path, model: str, family: str) -> torch.nn.Module:
    """The network in fp32, by the ordinary loader: the two files are linked into a folder of Hugging Face layout."""
    with tempfile.TemporaryDirectory() as home:
        place = Path(home) / FOLDERS[family]
        place.mkdir()
        (place / "diffusion_pytorch_model.safetensors").symlink_to(
            (folder / f"{model}.safetensors").resolve()
        )
        (place / "config.json").symlink_to((folder / f"{model}.config.json").resolve(strict=True))
        return open_checkpoint(home).load("denoiser", torch.float32)


def build_sampler(facts: dict) -> Sampler:
    """Our sampler of the recorded name, with the recorded shift for SD3."""
    name, steps, config = (
        facts["scheduler"]["name"],
        facts["num_inference_steps"],
        facts["scheduler"]["config"],
    )
    sampler = make_sampler(family_of(facts["model_kind"]).prediction, name, steps)
    return FlowEuler(steps, float(config["shift"])) if name == "flow" else sampler


def conditioning(recording: Recording, size_width: int) -> dict:
    """Both branches as the network takes them; SDXL's vector: pooled text, then six sinusoids `size_width` wide."""
    branches = {}
    for text in ("cond", "uncond"):
        embedding, pooled = recording.tensors[f"prompt_embeds_{text}"], recording.tensors[f"pooled_{text}"]
        if recording.facts["model_kind"] == "sdxl":
            sizes = sinusoid(recording.tensors["time_ids"], size_width).flatten(
                1
            )  # (1, 6) -> (1, 6 * size_width)
            branches[text] = UNetConditioning(embedding, torch.cat([pooled, sizes], dim=1))
        else:
            branches[text] = MMDiTConditioning(embedding, pooled)
    return branches


def switch_rule(facts: dict) -> SwitchRule:
    """The recorded rule; what is null or missing never switches."""
    never = facts["num_inference_steps"] + 1
    window, slope, cap, interval = (facts.get(name) for name in ("L_slope", "eps_slope", "tau_cap", "k"))
    return SwitchRule(
        never if window is None else window,
        0.0 if slope is None else slope,
        never if cap is None else cap,
        0 if interval is None else interval,
    )


def error(ours: Tensor, recorded: Tensor) -> float:
    """Relative L2 error; infinite where the shapes differ or a number is NaN."""
    if ours.shape != recorded.shape:
        return float("inf")
    difference = (ours.double() - recorded.double()).norm() / recorded.double().norm().clamp(min=1e-12)
    return difference.nan_to_num(float("inf")).item()


def ratio_error(ours: float | None, recorded: float) -> float:
    """Relative error of a discrepancy; infinite where ours has none."""
    return float("inf") if ours is None else abs(ours - recorded) / abs(recorded)


def replay(recording: Recording) -> tuple[bool, str]:
    """Play one recording; whether all agrees, and a line of figures."""
    facts, tensors = recording.facts, recording.tensors
    family, steps, rule = facts["model_kind"], facts["num_inference_steps"], switch_rule(facts)
    folder, model, sampler = recording.path.parent, facts["model"], build_sampler(facts)
    denoiser = load_denoiser(folder, model, family)
    config = json.loads((folder / f"{model}.config.json").read_text(encoding="utf-8"))
    told = conditioning(recording, config.get("addition_time_embed_dim") or 256)
    task = Task(denoiser, sampler, told, float(facts["guidance_scale"]), tensors["init_noise"])
    strategy = STRATEGIES["paper" if recording.hybrid else "serial"].on(denoiser)
    records = list(denoise(task, strategy, Settings(steps, rule), LocalTransport()))

    schedule = [
        error(sampler.timesteps, tensors["timesteps"]),
        error(sampler.scale_noise(task.noise), tensors["latents_0"]),
    ]
    if "sigmas" in tensors:
        schedule.append(error(sampler.sigmas, tensors["sigmas"]))
    if len(tensors["latents"]) != steps:
        raise UsageError(f"it holds the latents of {len(tensors['latents'])} steps out of {steps}.")
    latents = [error(record.latents, recorded) for record, recorded in zip(records, tensors["latents"])]
    log = facts.get("mae_log") or []  # 0 where nothing was measured
    discrepancies = [ratio_error(record.discrepancy, m) for record, m in zip(records, log) if m]
    errors = {"latents": latents, "discrepancies": discrepancies, "schedule": schedule}
    wrong = [f"{name} off" for name, values in errors.items() if not max(values, default=0.0) <= LIMIT]
    worst = max(range(steps), key=latents.__getitem__)
    figures = (
        f"latents {latents[worst]:.1e} (step {worst}), discrepancy {max(discrepancies, default=0.0):.1e}"
    )
    figures += f", schedule {max(schedule):.1e}"
    if recording.hybrid:
        switch = find_switch([record.discrepancy for record in records], rule)
        for name in ("tau1", "tau2"):
            ours, recorded = getattr(switch, name, None), facts.get(name)
            figures += f", {name} {ours}"
            # a stage that passes the last step ends there, whichever way its end is written
            if ours != recorded and (
                None in (ours, recorded) or name == "tau1" or min(ours, recorded) < steps - 1
            ):
                wrong.append(f"{name} {recorded} recorded")
        pipelined = [record.step for record in records if record.stage == "parallelism"]
        if recording.pipelined not in (pipelined, None):
            wrong.append(f"pipelined steps {pipelined}, recorded {recording.pipelined}")
    return not wrong, figures + (f"; {'; '.join(wrong)}" if wrong else "")


def main() -> int:
    """Replays all recordings in DIR, prints a line for each and a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder with the recordings")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        print(f"{folder} is not a folder: give the one that holds the recordings.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    paths = sorted(path for kind in ("hybrid", "serial") for path in folder.glob(f"*.{kind}.json"))
    agreed = counted = 0
    for path in paths:
        name = path.name.removesuffix(".json")
        try:
            facts, tensors = json.loads(path.read_text("utf-8")), load_file(path.with_suffix(".safetensors"))
            recording = Recording(path, facts, tensors)
            if recording.frozen:
                print(
                    f"{name}: not followed: the released code's frozen SD3 boundary; not counted", flush=True
                )
                continue
            good, line = replay(recording)
        except (LookupError, TypeError, AttributeError) as problem:
            good, line = False, f"cannot be replayed: not complete or not a recording ({problem!r})"
        except (OSError, ValueError, RuntimeError, SafetensorError, WeightsError, UsageError) as problem:
            good, line = False, f"cannot be replayed: {problem}"
        counted, agreed = counted + 1, agreed + good
        print(f"{name}: {'ok' if good else 'FAILED'}: {line}", flush=True)
    if not paths:
        print(
            f"{folder} holds no recording: there is no *.hybrid.json and no *.serial.json in it.",
            file=sys.stderr,
        )
    elif not counted:
        print(f"{folder} holds no recording that is followed here.", file=sys.stderr)
    else:
        print(
            f"{agreed} of {counted} recordings agree, limit {LIMIT:.0e}; {len(paths) - counted} not followed"
        )
    return 0 if counted and agreed == counted else 1


if __name__ == "__main__":
    sys.exit(main())
