"""Depth errors: in inv_depth against a relative teacher, in z against true depth after scale and shift.

`inv_depth` is [0, 1], larger = closer; z is in metres along the viewing axis, 0 where it is unknown.

Shape legend: H, W map height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InverseErrors:
    """Errors of one map in inv_depth, both in [0, 1]."""

    mae: float
    rmse: float


@dataclass(frozen=True)
class DepthErrors:
    """Errors of one map in z: `abs_rel` relative, `rmse` in metres, `delta*` shares of pixels within 1.25 ** k."""

    abs_rel: float
    rmse: float
    delta1: float
    delta2: float
    delta3: float
    pixels: int


def inverse_errors(found_HW: npt.ArrayLike, true_HW: npt.ArrayLike) -> InverseErrors:
    """MAE and RMSE of a map in inv_depth. Raises ValueError where shapes differ or a value is outside [0, 1]."""
    found, true = (_inv_depth(name, x) for name, x in (("found", found_HW), ("true", true_HW)))
    if found.shape != true.shape:
        raise ValueError(f"found map has shape {found.shape}, the true one {true.shape}: resize it first")
    error = found - true
    return InverseErrors(float(np.abs(error).mean()), float(np.sqrt(np.square(error).mean())))


def align(inv_depth_HW: npt.ArrayLike, true_z_HW: npt.ArrayLike) -> Floats:
    """z [H, W] in metres of a relative map, scaled and shifted by least squares *in inverse depth* (lineage: MiDaS).

    Only pixels with z > 0 are fitted. The scale is held at 0 or above, so that a map which calls far near gains nothing
    by a sign; inverse depth is held at or above that of the farthest true pixel, since z grows without bound there
    (reconstruction). Raises ValueError where shapes differ or no pixel has a true z.
    """
    inv_depth, z = _inv_depth("found", inv_depth_HW), np.asarray(true_z_HW, np.float64)
    known = _known(inv_depth, z)
    wanted = 1 / z[known]
    centred = inv_depth[known] - inv_depth[known].mean()
    spread = float(np.square(centred).sum())
    scale = max(float(centred @ (wanted - wanted.mean())) / spread, 0.0) if spread > 0 else 0.0
    fitted = scale * (inv_depth - inv_depth[known].mean()) + wanted.mean()
    z_HW: Floats = 1 / np.maximum(fitted, wanted.min())
    return z_HW


def z_errors(found_z_HW: npt.ArrayLike, z_HW: npt.ArrayLike) -> DepthErrors:
    """AbsRel, RMSE and deltas over the pixels with z > 0. Raises ValueError where shapes differ or none has one."""
    found, z = np.asarray(found_z_HW, np.float64), np.asarray(z_HW, np.float64)
    known = _known(found, z)
    found, z = found[known], z[known]
    ratio = np.maximum(found / z, z / found)
    return DepthErrors(
        abs_rel=float((np.abs(found - z) / z).mean()),
        rmse=float(np.sqrt(np.square(found - z).mean())),
        delta1=float((ratio < 1.25).mean()),
        delta2=float((ratio < 1.25**2).mean()),
        delta3=float((ratio < 1.25**3).mean()),
        pixels=len(z),
    )


def _known(found: Floats, z: Floats) -> npt.NDArray[np.bool_]:
    if found.shape != z.shape:
        raise ValueError(f"found map has shape {found.shape}, true z {z.shape}: resize it first")
    known = z > 0
    if not known.any():
        raise ValueError("true z is 0 everywhere: there is nothing to compare with; leave this image out")
    return np.asarray(known)


def _inv_depth(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    if not array.size or not (array.min() >= 0 and array.max() <= 1):  # NaN compares false, so it lands here too
        seen = f"[{array.min():g}, {array.max():g}]" if array.size else "nothing"
        raise ValueError(f"{name} inv_depth holds {seen}, expected finite values in [0, 1]: scale the map first")
    return array
