"""Models and batches of the decode and train benchmarks: real architectures, random weights and random images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntpseg.models import NTPSegModel, preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

_TEXT_TOKENS = 24
_SMALLEST: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


@dataclass(frozen=True)
class Size:
    """A model and its sequences.

    Attributes:
        preset: one of `ntpseg.models.PRESETS`, or "smallest" for tests.
        grid: side of the image's and the mask's token grid.
        codes: of image and mask each.
        text: text ids.
        batch: sequences.
        heads: k.
        dtype: that products are computed in.
    """

    preset: str
    grid: int
    codes: int
    text: int = 512
    batch: int = 8
    heads: int = 1
    dtype: str = "bfloat16"

    def parameters(self) -> dict[str, Any]:
        """Plain numbers for the rows."""
        fields = {"preset": self.preset, "grid": self.grid, "V": self.sequence().vocabulary.size, "B": self.batch}
        return {**fields, "k": self.heads, "dtype": self.dtype}

    def sequence(self) -> SequenceFormat:
        """Layout of one sample."""
        vocabulary = Vocabulary(self.text, self.codes, self.codes)
        return SequenceFormat(vocabulary, (self.grid, self.grid), (self.grid, self.grid))

    def model(self, device: torch.device) -> NTPSegModel:
        """With random weights in float32. Softmax over the whole vocabulary, as the peers' is."""
        smallest = self.preset == "smallest"
        config = preset_config(
            "tiny" if smallest else self.preset,
            self.sequence(),
            overrides=_SMALLEST if smallest else None,
            num_heads_k=self.heads,
            vocab_range=None,
        )
        torch.manual_seed(0)
        model = NTPSegModel(config)
        # Placeholders of shards cannot be moved.
        return model if device.type == "cpu" else model.to(device)  # type: ignore[arg-type]  # transformers hides it

    def batch_of(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Input ids and labels, ``[B, T]`` each."""
        sequence, generator = self.sequence(), torch.Generator().manual_seed(0)
        samples = []
        for _ in range(self.batch):
            text = torch.randint(0, self.text, (_TEXT_TOKENS,), generator=generator).tolist()
            image, mask = torch.randint(0, self.codes, (2, self.grid, self.grid), generator=generator).numpy()
            samples.append(sequence.build(text, image, mask))
        ids, labels = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*samples, strict=True))
        return ids.to(device), labels.to(device)


def hugging_face(model: NTPSegModel) -> Any:
    """The same decoder and head (of k = 1) as transformers' own causal language model, weights copied."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_config(model.config.text_config)
    peer.model.load_state_dict(model.backbone.state_dict())
    peer.lm_head.weight.data = model.heads.weight.detach().clone()
    return peer.to(model.heads.weight.device)


def matrices(model: NTPSegModel) -> list[Tensor]:
    """The weights of the decoder's linear layers, ``[out, in]``."""
    return [m.weight.detach() for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
