"""Arrays as small pictures for a page: depth in colours, masks over images, all as data URIs.

Shape legend: H, W image height and width, 3 the red, green and blue channels.
"""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

from perceptio.metrics.masks import Bools

Pixels = npt.NDArray[np.uint8]
COLOURS = "magma"  # of depth: dark = far, bright = close; even in lightness, so it reads in grey too
TINT = np.array([255, 64, 129], np.float64)  # of masks
OPACITY = 0.55


def depth_colours(inv_depth_HW: npt.NDArray[np.floating]) -> Pixels:
    """An inverse-depth map in [0, 1] as rgb_HW3: dark = far, bright = close."""
    rgba = matplotlib.colormaps[COLOURS](np.clip(inv_depth_HW, 0, 1), bytes=True)
    return np.asarray(rgba[..., :3], np.uint8)


def depth_scale() -> str:
    """The colours from far to close as a CSS gradient."""
    stops = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 9), bytes=True)[:, :3]
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in stops)})"


def tinted(rgb_HW3: Pixels, mask_HW: Bools) -> Pixels:
    """The image greyed and darkened outside the mask, tinted inside, with a light outline."""
    grey_HW1 = rgb_HW3.mean(-1, keepdims=True)
    inside = (1 - OPACITY) * rgb_HW3 + OPACITY * TINT
    shown = np.where(mask_HW[..., None], inside, 0.35 * rgb_HW3 + 0.35 * grey_HW1)
    padded = np.pad(mask_HW, 1)
    core_HW = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shown[mask_HW & ~core_HW] = 255
    return shown.astype(np.uint8)


def data_uri(rgb_HW3: Pixels) -> str:
    """The picture inside a URI: WebP of good quality."""
    stream = io.BytesIO()
    Image.fromarray(rgb_HW3).save(stream, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
