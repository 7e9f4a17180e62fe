"""Random shifts of images, which keep critics from learning the pixels of a small replay buffer by heart."""

import torch
from torch import Tensor

from fabricrl.utils.records import Records


def shift_images(records: Tensor, space: Records, pixels: int, generator: torch.Generator) -> Tensor:
    """Records [B, R] or [B, S, R] whose images are moved by up to so many pixels, at random (Kostrikov et al. 2020,
    arXiv:2004.13649, Section 4.1): padded by their edges on all sides, and cropped to their size again.

    Each observation has a shift of its own, which all frames of a stack and all its images share; vectors stay.
    """
    offsets = torch.randint(2 * pixels + 1, (len(records), 2), generator=generator, device=records.device) - pixels
    return moved(records, space, offsets)


def moved(records: Tensor, space: Records, offsets: Tensor) -> Tensor:
    """Records [B, R] or [B, S, R] with images moved up and left by `offsets` [B, 2]; pixels at the edges repeat.

    out[y, x] = in[clamp(y + Δy, 0, H − 1), clamp(x + Δx, 0, W − 1)]
    """
    records, (down, right) = records.clone(), offsets[..., None].unbind(1)  # [B, 1] each
    for image in space.images.values():
        _, height, width = image.sizes
        rows = (torch.arange(height, device=records.device) + down).clamp(0, height - 1)  # [B, H]
        columns = (torch.arange(width, device=records.device) + right).clamp(0, width - 1)  # [B, W]
        source = (rows[:, :, None] * width + columns[:, None]).flatten(1)  # [B, H W]
        pixels = image.of(records)  # [B, ..., C, H, W], a view
        flat = pixels.flatten(-2)
        source = source.view(len(source), *(1,) * (flat.ndim - 2), -1).expand_as(flat)
        pixels.copy_(flat.gather(-1, source).view(pixels.shape))
    return records
