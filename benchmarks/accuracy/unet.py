"""A U-Net (MONAI's) trained on a CPU for some core-minutes: with the image alone, or with the sentence as well.

The sentence enters as extra input channels: its words, word pairs and word triples are a multi-hot vector, which a
learned linear map turns into a few numbers, constant over the image; two more channels hold each pixel's place, without
which a convolution could not tell left from right. Data, size, augmentation and metric code are the package's own.
Training stops by its processor time, so that other work on the machine does not count; augmentation is included,
validation for the learning curve is not.

    python -m benchmarks.accuracy.unet DATA --minutes 30 [--text] [--size 224] [--augment '{"flip": 0.5}'] [--out R]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

from benchmarks.accuracy.common import arrays, score, split, write
from ntpseg.data import Augmentation
from ntpseg.evaluation.metrics import dice_scores

TEXT_CHANNELS = 16


def words(text: str) -> list[str]:
    """Words, pairs and triples of neighbouring words."""
    tokens = re.findall(r"\w+", text.lower())
    return [" ".join(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1)]


class Network(nn.Module):
    """MONAI's residual U-Net; with `codes` > 0 the sentence's code and the pixel's place are further channels."""

    def __init__(self, size: int, channels: int, codes: int, width: int) -> None:
        super().__init__()
        self.text: nn.Linear | None = nn.Linear(codes, TEXT_CHANNELS) if codes else None
        extra = TEXT_CHANNELS + 2 if codes else 0
        widths = [width * 2**i for i in range(5)]
        self.unet = UNet(2, channels + extra, 1, widths, (2, 2, 2, 2), num_res_units=2, norm="batch")
        line = torch.linspace(-1, 1, size)
        self.place: Tensor
        self.register_buffer("place", torch.stack(torch.meshgrid(line, line, indexing="ij"))[None])

    def forward(self, image: Tensor, code: Tensor | None) -> Tensor:
        if self.text is not None:
            batch, _, height, width = image.shape
            flat = self.text(code)[:, :, None, None].expand(-1, -1, height, width)
            image = torch.cat([image, flat, self.place.expand(batch, -1, -1, -1)], 1)
        return self.unet(image.contiguous(memory_format=torch.channels_last))


class Trainer:
    """Data, network and clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.rng = args, np.random.default_rng(args.seed)
        self.train = split(args.data, "train", args.limit)
        self.images, self.masks = arrays(self.train, args.size, args.channels)
        self.names: dict[str, int] = {}
        if args.text:
            for record in self.train:
                for word in words(record.text):
                    self.names.setdefault(word, len(self.names))
        self.augmentation = Augmentation(**json.loads(args.augment))
        self.network = Network(args.size, args.channels, len(self.names), args.width)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub lacks it
        self.curve: list[dict[str, float]] = []

    def code(self, texts: list[str]) -> Tensor | None:
        """Multi-hot codes ``[B, words]``."""
        if not self.names:
            return None
        out = torch.zeros(len(texts), len(self.names))
        for row, text in enumerate(texts):
            known = [self.names[w] for w in words(text) if w in self.names]
            out[row, known] = 1.0
        return out

    def predict(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """Foreground probabilities float32 ``[N, S, S]``."""
        self.network.eval()
        probabilities = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            for i in range(0, len(images), 32):
                logits = self.network(torch.from_numpy(images[i : i + 32]), self.code(texts[i : i + 32]))
                probabilities.append(logits[:, 0].float().sigmoid().numpy())
        return np.concatenate(probabilities)

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
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, weight_decay=0.01)
        loss_of = DiceCELoss(sigmoid=True, batch=True)
        budget, used, step, next_point = 60.0 * args.minutes, 0.0, 0, 0.1
        # One batch is augmented in a thread while the last one trains.
        with ThreadPoolExecutor(1) as pool:
            order = self._order(0)
            pending = pool.submit(self.batch, order[: args.batch_size], 0)
            while used < budget:
                started = time.process_time()
                images, masks, texts = pending.result()
                step += 1
                per_epoch = max(1, len(self.train) // args.batch_size)
                if step % per_epoch == 0:
                    order = self._order(step // per_epoch)
                first = step % per_epoch * args.batch_size
                pending = pool.submit(self.batch, order[first : first + args.batch_size], step)
                done = used / budget
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min(1.0, step / 50) * 0.5 * (1 + np.cos(np.pi * min(1.0, done)))
                self.network.train()
                with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                    logits = self.network(images, self.code(texts))
                loss = loss_of(logits.float(), masks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                used += time.process_time() - started
                if used / budget >= next_point or used >= budget:
                    next_point += 0.1
                    dice = dice_scores(self.predict(val_images, [r.text for r in val]) >= 0.5, val_masks)
                    point = {"minutes": used / 60, "step": step, "loss": float(loss), "val_dice": float(dice.mean())}
                    self.curve.append(point)
                    print(" ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.args.seed, 1, epoch]).permutation(len(self.train))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, required=True, help="processor time of training, over all threads")
    parser.add_argument("--text", action="store_true", help="the sentence's code as extra channels")
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
    trainer = Trainer(args)
    trainer.fit()
    test = split(args.data, "test")
    images, _ = arrays(test, args.size, args.channels)
    started = time.perf_counter()
    probability = trainer.predict(images, [r.text for r in test])
    seconds = time.perf_counter() - started
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    result = {
        "baseline": "U-Net with the sentence's code" if args.text else "U-Net, image alone",
        "options": options,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "curve": trainer.curve,
        "images_per_second": len(test) / seconds,
        "test": score(test, lambda i: probability[i]),
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
