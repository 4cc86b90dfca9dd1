"""A convolutional baseline trained for some minutes, of a processor or a GPU, see `networks`.

Data, size, augmentation and metric code are the package's own, as are the optimizer (``--optimizer muon``) and the
average of the weights (``--ema``), so that a difference is one of models. On a CPU training stops by its processor
time, so that other work on the machine does not count; augmentation is included, validation for the learning curve is
not. A GPU's work does not show in it, so there wall time counts.

    python -m benchmarks.accuracy.baseline DATA --minutes 30 [--network text-unet] [--size 224] [--test] [--out R]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.accuracy.common import arrays, score, split, write
from benchmarks.accuracy.networks import ImageDynUNet, Sentences, TextUNet, WordAttentionUNet
from ntpseg.data import Augmentation, swap_laterality
from ntpseg.evaluation.metrics import dice_scores
from ntpseg.training.decoding_choice import GAIN_PER_PASS, THRESHOLDS
from ntpseg.training.ema import WeightAverage
from ntpseg.training.hardware import keep_freed_memory
from ntpseg.training.muon import Muon

NETWORKS = ("unet", "text-unet", "word-attention", "dynunet")
MAX_GRAD_NORM = 1.0


class NetworkAverage(WeightAverage):
    """Of the statistics of batch normalisation too, which belong to the weights that they were taken with."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, decay)
        self.statistics = [buffer.clone() for buffer in _statistics(network)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """See `WeightAverage`."""
        super().update(model)
        torch._foreach_lerp_(self.statistics, _statistics(model), 1 - self.step_decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """See `WeightAverage`."""
        super().copy_to(model)
        torch._foreach_copy_(_statistics(model), self.statistics)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """See `WeightAverage`."""
        own = [buffer.clone() for buffer in _statistics(model)]
        with super().applied(model):
            yield
        torch._foreach_copy_(_statistics(model), own)


def _statistics(network: nn.Module) -> list[Tensor]:
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


class Trainer:
    """Data, network and clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.train = split(args.data, "train", args.limit)
        self.images, self.masks = arrays(self.train, args.size, args.channels)
        self.sentences = Sentences([r.text for r in self.train], 1 if args.network == "word-attention" else 3)
        self.augmentation = Augmentation(**json.loads(args.augment))
        self.network = make_network(args, len(self.sentences))
        self.network.to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub lacks it
        self.curve: list[dict[str, float]] = []

    def code(self, texts: list[str]) -> Tensor | None:
        """What the network reads of the sentences."""
        if self.args.network == "word-attention":
            return self.sentences.ids(texts).to(self.device)
        return self.sentences.multi_hot(texts).to(self.device) if self.args.network == "text-unet" else None

    def now(self) -> float:
        """Seconds of the clock that the budget is counted by."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def predict(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """Foreground probabilities float32 ``[N, S, S]``."""
        self.network.eval()
        probabilities = []
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            for i in range(0, len(images), 32):
                pixels = torch.from_numpy(images[i : i + 32]).to(self.device)
                logits = self.network(pixels, self.code(texts[i : i + 32]))
                probabilities.append(logits[:, 0].float().sigmoid().cpu().numpy())
        return np.concatenate(probabilities)

    def predict_both(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """The mean of what `predict` gives for the images and for their mirror images, sides exchanged in the text."""
        mirrored = self.predict(np.ascontiguousarray(images[..., ::-1]), [swap_laterality(text) for text in texts])
        return (self.predict(images, texts) + mirrored[..., ::-1]) / 2

    def batch(self, chosen: np.ndarray, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        """Augmented images, masks and sentences."""
        rng = np.random.default_rng([self.args.seed, seed])
        samples = [
            self.augmentation.apply(self.images[i], self.masks[i][None].astype(np.float32), self.train[i].text, rng)
            for i in chosen
        ]
        images, masks, texts = zip(*samples, strict=True)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), list(texts)

    def fit(self) -> None:
        """Train until the core-minutes are used up; the learning rate follows them."""
        args = self.args
        val = split(args.data, "val", args.val_cases)
        val_images, val_masks = arrays(val, args.size, args.channels)
        optimizer = self._optimizer()
        average = NetworkAverage(self.network, args.ema) if args.ema else None
        loss_of = DiceCELoss(sigmoid=True, batch=args.dice == "batch")
        budget, used, step, next_point = 60.0 * args.minutes, 0.0, 0, 0.1
        # One batch is augmented in a thread while the last one trains.
        with ThreadPoolExecutor(1) as pool:
            order = self._order(0)
            pending = pool.submit(self.batch, order[: args.batch_size], 0)
            while used < budget:
                started = self.now()
                images, masks, texts = pending.result()
                step += 1
                per_epoch = max(1, len(self.train) // args.batch_size)
                if step % per_epoch == 0:
                    order = self._order(step // per_epoch)
                first = step % per_epoch * args.batch_size
                pending = pool.submit(self.batch, order[first : first + args.batch_size], step)
                done = used / budget
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, step / 50) * 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
                self.network.train()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                    logits = self.network(images.to(self.device), self.code(texts))
                loss = loss_of(logits.float(), masks.to(self.device))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                if average is not None:
                    average.update(self.network)
                used += self.now() - started
                if used / budget >= next_point or used >= budget:
                    next_point += 0.1
                    with average.applied(self.network) if average is not None else nullcontext():
                        dice = dice_scores(self.predict(val_images, [r.text for r in val]) >= 0.5, val_masks)
                    point = {"minutes": used / 60, "step": step, "loss": float(loss), "val_dice": float(dice.mean())}
                    self.curve.append(point)
                    print(" ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)

        if average is not None:
            average.copy_to(self.network)

    def _optimizer(self) -> torch.optim.Optimizer:
        args, parameters = self.args, list(self.network.parameters())
        # The last layer's rows are pixels' classes, not directions; it has one row here.
        matrices = [p for p in parameters if p.dim() == 4 and min(p.shape[0], p[0].numel()) >= 8]
        chosen = {id(p) for p in matrices} if args.optimizer == "muon" else set()
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in chosen]}]
        if chosen:
            groups.append({"params": matrices, "muon": True, "weight_decay": 0.0})
        optimizer = Muon(groups, lr=args.lr, muon_lr=args.muon_lr, weight_decay=0.01)
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        return optimizer

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.args.seed, 1, epoch]).permutation(len(self.train))


def make_network(args: argparse.Namespace, words: int) -> Any:
    """The network that the arguments name."""
    if args.network == "dynunet":
        return ImageDynUNet(args.channels, args.width)
    if args.network == "word-attention":
        return WordAttentionUNet(args.size, args.channels, words, args.width)
    return TextUNet(args.size, args.channels, words if args.network == "text-unet" else 0, args.width)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--minutes", type=float, required=True, help="of training: processor time over all threads, on a GPU wall time"
    )
    parser.add_argument("--network", choices=NETWORKS, default="text-unet")
    parser.add_argument("--dice", choices=("batch", "image"), default="image", help="what the loss's Dice is taken of")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the average of the weights; 0: none")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--test", action="store_true", help="score the test split: once, for a final model")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side, a multiple of 16")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--augment", default="{}", help="JSON of ntpseg.data.Augmentation's fields")
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="at most this many training cases")
    parser.add_argument("--val-cases", type=int, default=200, help="validation cases of the learning curve")
    parser.add_argument("--threads", type=int, help="PyTorch threads; by default as many as it takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.size % 16:
        parser.error(f"--size must be a multiple of 16, got {args.size}")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    # As `ntpseg train` does: a third of a step on a CPU.
    keep_freed_memory()
    trainer = Trainer(args)
    trainer.fit()
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    result = {
        "baseline": args.network,
        "options": options,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "curve": trainer.curve,
        "steps": int(trainer.curve[-1]["step"]),
    }
    for name in ("val", "test") if args.test else ("val",):
        records = split(args.data, name)
        images, truth = arrays(records, args.size, args.channels)
        texts = [r.text for r in records]
        if name == "val":
            # As for this package's model, so that both read out at their best.
            scores: dict[tuple[bool, float], float] = {}
            for mirror in (False, True) if trainer.augmentation.flip else (False,):
                probability = trainer.predict_both(images, texts) if mirror else trainer.predict(images, texts)
                for t in THRESHOLDS:
                    scores[mirror, t] = float(dice_scores(probability >= t, truth).mean())
            best = max(scores, key=lambda key: (scores[key] - GAIN_PER_PASS * key[0], -abs(key[1] - 0.5)))
            result["mirror"], result["threshold"] = best
        started = time.perf_counter()
        probability = (trainer.predict_both if result["mirror"] else trainer.predict)(images, texts)
        result["images_per_second"] = len(records) / (time.perf_counter() - started)
        result[name] = score(records, probability.__getitem__, result["threshold"])
    write(args.out, result)


if __name__ == "__main__":
    main()
