"""Encoding still images with an Emu3VQVAE: ours against the model's own `encode`, in turns, by processor time.

    python -m benchmarks.emu3_encoding [--results DIR]

Random weights; the layers, the factor in time (4) and the codebook (32,768 x 4) are Emu3's, the channels a quarter of
its own. Memory is what the nearest-code search stores of distances.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.harness.environment import describe
from benchmarks.harness.rows import RESULTS, rounded
from benchmarks.harness.timing import ratio_quartiles
from ntpseg.tokenizers.still_image import _DISTANCES, encode_still
from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from transformers import Emu3VQVAE


def main() -> None:
    """Prints and writes ``emu3_encoding.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(0)
    config = Emu3VQVAEConfig(base_channels=64, channel_multiplier=[1, 2, 2, 4], hidden_size=256, attn_resolutions=[3])
    model = Emu3VQVAE(config).eval()
    rows = []
    for side in args.sides:
        batch = max(1, 4 * 64**2 // side**2)
        images = torch.randn(batch, 3, side, side)
        calls = {
            "transformers": partial(_reference, model, images),
            "ntpseg": partial(encode_still, model, images),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            codes = {name: call() for name, call in calls.items()}
            for _ in range(args.rounds):
                for name, call in calls.items():
                    start = time.process_time()
                    call()
                    seconds[name].append(time.process_time() - start)
        tokens = codes["ntpseg"].numel()
        row = {
            "side": side,
            "images": batch,
            "tokens": tokens,
            "equal_codes": bool((codes["ntpseg"] == codes["transformers"]).all()),
            "times_as_fast": ratio_quartiles(seconds["transformers"], seconds["ntpseg"]),
            "distance_bytes": {
                "transformers": 4 * tokens * config.codebook_size,
                "ntpseg": 4 * min(tokens * config.codebook_size, _DISTANCES),
            },
        }
        rows.append(row)
        print(rounded(row), flush=True)
    content = {"emu3_encoding": rows, "command": "python -m benchmarks.emu3_encoding"}
    write_json(args.results / "emu3_encoding.json", rounded(content | describe(torch.device("cpu"))))


def _reference(model: Emu3VQVAE, images: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor([list(images.shape[2:])] * len(images))
    return torch.stack(list(model.encode(images, image_sizes=sizes).image_tokens))


if __name__ == "__main__":
    main()
