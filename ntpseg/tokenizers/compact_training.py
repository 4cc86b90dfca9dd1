"""Training of `CompactVQ`: axes and codebook from patches, then each decoder by gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

from ntpseg.tokenizers.compact import MASK_GAIN, CompactVQ, CompactVQOptions
from ntpseg.tokenizers.patch_vq import PatchVQ, fill_quantizer, make_quantizer
from ntpseg.utils.finite import non_finite_tensor
from ntpseg.utils.progress import progress_bar

_KMEANS_ITERATIONS = 15
_CODEBOOK_BATCH = 4096

Advance = Callable[[int], None]


def train_compact_vq(
    images: Tensor,
    masks: Tensor,
    options: CompactVQOptions | None = None,
    progress: bool = True,
) -> CompactVQ:
    """Train image and mask branch; the same input, options and number of threads give the same weights.

    Args:
        images: float [N, C, S, S] in [-1, 1].
        masks: float [N, 1, S, S] in {0, 1}.
        options: see `CompactVQOptions`.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: shapes that do not belong together, values out of range, no image at all, or a training that
            diverged.
    """
    options = options or CompactVQOptions()
    _check(images, masks)
    generator = torch.Generator().manual_seed(options.seed)
    if len(images) > options.max_images:
        chosen = torch.randperm(len(images), generator=generator)[: options.max_images].to(images.device)
        images, masks = images[chosen], masks[chosen]
    images, masks = images.float(), masks.float()
    # The quantizer library draws from the global generator.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(options.seed)
        model = CompactVQ(images.shape[-1], images.shape[1], options).to(images.device)
        total = (1 + (model.image is not None)) * (options.steps + options.codebook_steps)
        with progress_bar("vision tokenizer", total, enabled=progress) as advance:
            if model.image is not None:
                _fit_codebook(model.image, _patches(images, options.factor), (), options, generator, advance)
                _fit_decoder(model.image, images, F.mse_loss, options, generator, advance)
            patches = _patches(masks, options.factor)
            constant = (torch.zeros_like(patches[0]), torch.ones_like(patches[0]))
            # Most patches are all background. It and all foreground have their codes; boundaries need the rest.
            mean = patches.mean(1)
            mixed = patches[(mean > 0) & (mean < 1)]
            _fit_codebook(model.mask, mixed if len(mixed) else patches, constant, options, generator, advance)
            _fit_decoder(model.mask, masks, _mask_loss, options, generator, advance)
    model.eval().requires_grad_(False)
    pixels = [model.mask.decode(model.mask.encode(masks[:1]))]
    if model.image is not None:
        pixels.append(model.image.decode(model.image.encode(images[:1])))
    if non_finite_tensor(model) is not None or not all(bool(decoded.isfinite().all()) for decoded in pixels):
        raise ValueError(
            "the vision tokenizer must decode finite pixels after its training, got nan or inf; "
            f"lower vision.learning_rate ({options.learning_rate:g})"
        )
    return model


def _check(images: Tensor, masks: Tensor) -> None:
    if images.dim() != 4 or not len(images) or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [N, C, S, S] with N >= 1, got {list(images.shape)}")
    expected = [len(images), 1, *images.shape[2:]]
    if list(masks.shape) != expected:
        raise ValueError(f"masks must be {expected}, got {list(masks.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"images must be within [-1, 1], got values from {low:.4g} to {high:.4g}")
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"masks must be binary, 0 or 1, got values up to {float(masks.max()):.4g}")


def _patches(x: Tensor, factor: int) -> Tensor:
    """Float [N * h * w, C * factor**2], pixels in the order of a convolution's weight."""
    n, c, s, _ = x.shape
    g = s // factor
    return x.view(n, c, g, factor, g, factor).permute(0, 2, 4, 1, 3, 5).reshape(n * g * g, c * factor**2)


def _mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, mask)


@torch.no_grad()
def _fit_codebook(
    branch: PatchVQ,
    patches: Tensor,
    fixed: tuple[Tensor, ...],
    options: CompactVQOptions,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Principal axes of the patches, then k-means, then EMA over fresh patches; `fixed` patches are codes 0, 1, ..."""
    codes, dim = branch.codebook.shape

    def draw(count: int) -> Tensor:
        """Patches without replacement; where there are fewer than codes, some twice (unused codes are harmless)."""
        order = torch.randperm(len(patches), generator=generator)[:count]
        if len(order) < codes:
            order = order.repeat(-(-codes // len(order)))
        return patches[order.to(patches.device)]

    sample = draw(options.codebook_patches)
    mean = sample.mean(0)
    centred = sample - mean
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1).T[:dim]
    is_mask = bool(fixed)
    branch.set_axes(axes, mean, gain=MASK_GAIN if is_mask else 1.0, centre=0.5 if is_mask else 0.0)

    def project(x: Tensor) -> Tensor:
        return (x - mean) @ axes.T

    def initial_means(samples: Tensor, count: int) -> Tensor:
        return _kmeans_plus_plus(samples[0], count, generator)[None]

    means, counts = kmeans(project(sample)[None], codes - len(fixed), _KMEANS_ITERATIONS, sample_fn=initial_means)
    quantizer = make_quantizer(dim, codes - len(fixed)).to(patches.device).train()
    fill_quantizer(quantizer, means[0], counts[0] * (_CODEBOOK_BATCH / len(sample)))
    for _ in range(options.codebook_steps):
        quantizer(project(draw(_CODEBOOK_BATCH))[None])
        advance(1)
    rows = [project(patch)[None] for patch in fixed]
    fill_quantizer(branch.quantizer, torch.cat([*rows, quantizer.codebook]))


def _kmeans_plus_plus(samples: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds (Arthur and Vassilvitskii 2007), float [count, dim]: drawn by squared distance to those before.

    Uniform seeds waste codes on copies of the commonest patch, black air.
    """
    device = samples.device
    chosen = torch.randint(len(samples), (1,), generator=generator).to(device)
    distance = torch.full((len(samples),), torch.inf, device=device)
    while len(chosen) < count:
        distance = torch.minimum(distance, (samples - samples[chosen[-1]]).square().sum(1))
        # Fewer distinct samples than codes: any will do for the rest.
        weight = distance if bool(distance.sum() > 0) else torch.ones_like(distance)
        following = torch.multinomial(weight.cpu(), 1, generator=generator).to(device)
        chosen = torch.cat([chosen, following])
    return samples[chosen]


def _fit_decoder(
    branch: PatchVQ,
    x: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    options: CompactVQOptions,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Train synthesis on the codes of `x` and of its mirror image; analysis and codebook stay as they are."""
    if not options.steps:
        return
    trained = [p for part in (branch.base, branch.context, branch.blocks, branch.correction) for p in part.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    for _ in range(options.steps):
        index = torch.randint(len(x), (options.batch_size,), generator=generator).to(x.device)
        batch = x[index]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        with torch.no_grad():
            codes = branch.encode(batch)
        optimizer.zero_grad(set_to_none=True)
        loss_fn(branch.decode(codes), batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        advance(1)
