"""Trains tiny_flux: rectified flow on drawn scenes, in stages of growing resolution, each with a time budget.

    PYTHONPATH=python python tools/tiny_flux/train.py --out run1 --stage 64,256,240 --stage 128,128,150
    PYTHONPATH=python python tools/tiny_flux/train.py --out run2 --resume run1 --stage 256,32,400,1,0

A stage is SIDE,BATCH,SECONDS[,LR,LR_AT_END[,GUIDANCE]]: picture side in pixels, pictures a step, seconds of
training (including compilation; a trailing "n" counts steps instead, as in 9000n), the factors on the
learning rates at its start and end (1,1 by default), and the guidance that the model learns to have built in
(1: none).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from data import Stream
from model import image_ids, load_checkpoint, new_model, save_checkpoint, to_tokens
from optimizer import Optimizer
from sampling import contact_sheet, evaluate

from flashomni.tiny_flux import HELD_OUT_PROMPTS
from flashomni.tiny_flux.pipeline import SHIFT, SIDE
from flashomni.tiny_flux.scene import sample_scenes, scene_prompts
from flashomni.tiny_flux.vocabulary import MAX_WORDS, embed_ids

MUON_LR, ADAM_LR = 2.5e-3, 1e-3
WARMUP = 150  # steps, at the start of each run
CAPTION_DROPOUT = 0.1
LOG_EVERY = 100
EMA_SHARE, EMA_MOST = 0.1, 1500  # the average spans a tenth of the stage so far, at most so many steps


@dataclasses.dataclass
class Stage:
    side: int
    batch: int
    budget: float  # seconds, or steps
    in_steps: bool
    lr: float = 1.0
    lr_at_end: float = 1.0
    guidance: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Stage:
        side, batch, budget, *rest = text.split(",")
        return cls(int(side), int(batch), float(budget.rstrip("n")), budget.endswith("n"), *map(float, rest))

    def shift(self) -> float:
        """Timestep shift. What a picture shows is decided at noise that grows with its side."""
        return shift_at(self.side)


def shift_at(side: int) -> float:
    """A compromise between 1 / side, which hides alike, and more weight on content where steps are cheap."""
    return SHIFT * (side / SIDE) ** 0.5


def sample_times(n: int, shift: float, device: torch.device) -> torch.Tensor:
    """Times [n] in (0, 1), 1 is noise: logit-normal, a sixth uniform, shifted as in sampling."""
    t = torch.sigmoid(torch.randn(n, device=device))
    t = torch.where(torch.rand(n, device=device) < 1 / 6, torch.rand(n, device=device), t)
    return shift * t / (1 + (shift - 1) * t)


class Trainer:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        # cuDNN's attention backward crashed on these shapes (torch 2.11); flash attention serves.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = new_model(self.device)
        self.average_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ema = self.average_model.state_dict()
        self.meta = {"step": 0, "images": 0, "seconds": 0.0, "seed": args.seed, "runs": 0}
        if args.resume:
            self.meta |= load_checkpoint(args.resume, self.model, self.ema)
            torch.manual_seed(args.seed + self.meta["step"])
        self.meta["runs"] += 1
        self.params = dict(self.model.named_parameters())
        self.ema_list = [self.ema[name] for name in self.params]
        self.optimizer = Optimizer(self.model, args.muon_lr, args.adam_lr)
        self.stream = Stream(args.seed + self.meta["step"], self.device)
        self.no_ids = torch.zeros(MAX_WORDS, 3, device=self.device)
        # Says what the model would draw without a caption; shares the average's tensors, so it follows it.
        self.teacher = copy.deepcopy(self.average_model)
        self.teacher.load_state_dict(self.ema, assign=True)
        self.teacher.requires_grad_(False)
        if not args.no_compile:
            self.model.compile_repeated_blocks(dynamic=False)
            self.teacher.compile_repeated_blocks(dynamic=False)
        self.start = time.perf_counter()
        args.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / "train.jsonl").open("a")
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.log(event="start", device=name, torch=torch.__version__, stages=args.stage, **self.meta)

    def log(self, **record) -> None:
        record["elapsed"] = round(time.perf_counter() - self.start, 2)
        line = json.dumps(record)
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def velocity(self, model, mixed, t, words, ids) -> torch.Tensor:
        """The velocity that a model predicts for noisy tokens [B, n, 48] and word ids [B, 16]."""
        embeds, pooled = embed_ids(words)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model(
                hidden_states=mixed,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=t,  # FluxPipeline passes t / 1000 of the scheduler's 0..1000, which is this
                img_ids=ids,
                txt_ids=self.no_ids,
                return_dict=False,
            )[0].float()

    def loss(self, stage: Stage, ids: torch.Tensor) -> torch.Tensor:
        pictures, words = self.stream.batch(stage.batch, stage.side, CAPTION_DROPOUT)
        clean = to_tokens(pictures)
        noise = torch.randn_like(clean)
        t = sample_times(stage.batch, stage.shift(), self.device)
        mixed = torch.lerp(clean, noise, t[:, None, None])
        velocity = self.velocity(self.model, mixed, t, words, ids)
        target = noise - clean
        if stage.guidance > 1:
            target = target + self.guidance(stage, velocity.detach(), mixed, t, words, ids)
        return torch.nn.functional.mse_loss(velocity, target)

    @torch.no_grad()
    def guidance(self, stage: Stage, velocity, mixed, t, words, ids) -> torch.Tensor:
        """What a guided velocity has beyond the data's (model guidance, arXiv 2502.12154).

        The model itself is pushed away from what its average predicts without a caption, so that sampling
        needs no second pass. With push p, v = data + p (v - free) holds where v = free + (data - free) /
        (1 - p): the guidance g = 1 / (1 - p). Emptied captions stay as they are.
        """
        free = self.velocity(self.teacher, mixed, t, torch.zeros_like(words), ids)
        captioned = (words != 0).any(1)[:, None, None]
        return (1 - 1 / stage.guidance) * (velocity - free) * captioned

    def run(self, stage: Stage, warm: bool) -> None:
        ids = image_ids(stage.side, self.device)
        begin = last = time.perf_counter()
        losses = torch.zeros((), device=self.device)
        step = 0
        while (done := step if stage.in_steps else time.perf_counter() - begin) < stage.budget:
            factor = stage.lr + (stage.lr_at_end - stage.lr) * done / stage.budget
            if not warm:
                factor *= min(1.0, (step + 1) / WARMUP)
            loss = self.loss(stage, ids)
            loss.backward()
            self.optimizer.step(factor)
            step += 1
            weight = 1 / max(1.0, min(EMA_MOST, EMA_SHARE * step))
            torch._foreach_lerp_(self.ema_list, [p.detach() for p in self.params.values()], weight)
            losses += loss.detach()
            if step == 1 or step % LOG_EVERY == 0:
                steps = 1 if step == 1 else LOG_EVERY - (step == LOG_EVERY)
                mean, now = losses.item() / steps, time.perf_counter()
                losses.zero_()
                rate = round(steps * stage.batch / (now - last), 1)
                last = now
                self.log(
                    side=stage.side, step=self.meta["step"] + step, loss=round(mean, 5), lr=factor, rate=rate
                )
                if mean != mean:
                    raise SystemExit("the loss is not a number")
        self.meta["step"] += step
        self.meta["images"] += step * stage.batch
        self.meta["seconds"] += round(time.perf_counter() - begin, 2)

    def judge(self, side: int, shift: float, held_out: bool = True) -> None:
        """Scores the averaged model on held-out prompts, or on as many of training's, and logs it."""
        prompts = HELD_OUT_PROMPTS[: self.args.prompts]
        if not held_out:
            scenes = sample_scenes(2 * len(prompts), torch.Generator().manual_seed(1), held_out=False)
            prompts = scene_prompts(scenes)[: len(prompts)]
        scores, pictures = evaluate(self.average_model, prompts, side, self.args.sample_steps, shift)
        event = "held out" if held_out else "seen"
        self.log(event=event, side=side, steps=self.args.sample_steps, shift=shift, **scores)
        if shift == shift_at(side):
            contact_sheet(pictures[:40]).save(self.args.out / f"{event.replace(' ', '-')}.jpg", quality=92)

    def train(self) -> None:
        for i, stage in enumerate(map(Stage.parse, self.args.stage)):
            self.run(stage, warm=i > 0)
            save_checkpoint(self.args.out, self.model, self.ema, self.meta)
            self.log(event="saved", **self.meta)
            self.judge(stage.side, stage.shift())
        for shift in self.args.sweep:
            self.judge(stage.side, shift)
        self.judge(stage.side, stage.shift(), held_out=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and samples")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run")
    parser.add_argument("--stage", action="append", required=True)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--muon-lr", type=float, default=MUON_LR)
    parser.add_argument("--adam-lr", type=float, default=ADAM_LR)
    parser.add_argument("--prompts", type=int, default=120, help="held-out prompts to judge after each stage")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=[], help="other shifts to sample with at the end"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Trainer(parser.parse_args()).train()


if __name__ == "__main__":
    main()
