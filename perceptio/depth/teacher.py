"""Depth teachers: any depth model of transformers, from images to 16-bit inverse-depth maps.

Shape legend: B batch, H, W image height and width in pixels, 3 the red, green and blue channels.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from schemas.tables import Reason

Kind = Literal["relative", "metric"]
# what the models predict whose config has no depth_estimation_type
KINDS: dict[str, Kind] = {"dpt": "relative", "glpn": "metric", "zoedepth": "metric"}
STEPS = 65535  # inv_depth 1.0 in 16 bits
FLAT = 1e-5  # a map whose range is below this share of its largest value says nothing


class DepthError(ValueError):
    """An image without a usable depth map; `reason` is fit for a rejects row."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class TeacherMap:
    """One image's inverse depth, min-max scaled to 16 bits, with the scale that was taken out."""

    inv_depth_HW: npt.NDArray[np.uint16]  # 65535 = closest, 0 = farthest
    raw_min: float  # raw inverse depth where inv_depth is 0
    raw_max: float  # raw inverse depth where inv_depth is 65535


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it; images of one `shape` can share a batch."""

    pixels_13HW: torch.Tensor
    size: tuple[int, int]  # height and width of the image itself

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's input."""
        return tuple(self.pixels_13HW.shape)


@dataclass(frozen=True)
class TeacherCard:
    """What a teacher is, told from its files alone."""

    folder: Path
    kind: Kind
    digest: str  # of weights and configs
    licence: str  # an SPDX identifier where the model card names one, else "unknown"

    @classmethod
    def read(cls, source: str | Path, kind: Kind | None = None) -> TeacherCard:
        """The card of a folder, or of a hub repository, which is fetched (safetensors only).

        `kind` says what the model predicts where its config does not. Raises ValueError when nothing says it,
        FileNotFoundError when a folder lacks its files.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "README.md"]))
        digest = folder_digest(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = kind or config.get("depth_estimation_type") or KINDS.get(config.get("model_type"))
        if found not in ("relative", "metric"):
            raise ValueError(
                f"{source}: config.json has model_type {config.get('model_type')!r}, depth_estimation_type {found!r};"
                f" expected 'relative' (inverse depth) or 'metric' (metres), or a model_type of {sorted(KINDS)}"
            )
        return cls(folder, found, digest, _licence(folder))


class DepthTeacher:
    """A frozen monocular depth model: images in, `TeacherMap`s out.

    In one call, or in three steps, so that the first and the last can run in threads beside the model: `prepare` an
    image, `predict` a batch of one shape, scale each raw map with `scaled_map`.
    """

    def __init__(self, model: Any, processor: Any, kind: Kind, digest: str, licence: str) -> None:
        self.model = model
        self.processor = processor
        self.kind = kind
        self.digest = digest
        self.licence = licence

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        kind: Kind | None = None,
    ) -> DepthTeacher:
        """The teacher in a folder, or in a hub repository (safetensors only). Raises as `TeacherCard.read` does."""
        card = TeacherCard.read(source, kind)
        processor = AutoImageProcessor.from_pretrained(card.folder)  # type: ignore[no-untyped-call]
        model = AutoModelForDepthEstimation.from_pretrained(card.folder, dtype=dtype, use_safetensors=True)
        return cls(model.to(device).eval(), processor, card.kind, card.digest, card.licence)

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[TeacherMap | DepthError]:
        """One map per image, at the image's own size; a `DepthError` in the slot of an image that has none.

        images: rgb_HW3 each, any mix of sizes; those of one shape after preprocessing share a batch.
        """
        maps: dict[int, TeacherMap | DepthError] = {}
        by_shape: dict[tuple[int, ...], dict[int, Prepared]] = defaultdict(dict)
        for index, image in enumerate(images):
            try:
                prepared = self.prepare(image)
            except DepthError as error:
                maps[index] = error
            else:
                by_shape[prepared.shape][index] = prepared
        for indexed in by_shape.values():
            for index, raw_HW in zip(indexed, self.predict(list(indexed.values())), strict=True):
                maps[index] = _slot(raw_HW)
        return [maps[i] for i in range(len(images))]

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> Prepared:
        """The model's input by its own preprocessing; threads may share it.

        Raises DepthError where a side would shrink to nothing, as the processor finds.
        """
        height, width = rgb_HW3.shape[:2]
        try:
            inputs = self.processor(images=rgb_HW3, input_data_format="channels_last", return_tensors="pt")
        except ValueError as error:
            message = f"the image is {width} x {height} pixels, which the teacher cannot take: {error}"
            raise DepthError(Reason.TOO_SMALL, message) from error
        return Prepared(torch.as_tensor(inputs["pixel_values"]), (height, width))

    @torch.inference_mode()
    def predict(self, batch: Sequence[Prepared]) -> list[npt.NDArray[np.float32]]:
        """Raw inverse depth (H, W) of each image of a batch of one shape, at the image's own size; larger = closer.

        The resize back is the model's own post-processing, so a relative map equals that of transformers'
        depth-estimation pipeline. Metric depth is turned into 1/z before the resize, where every z is still as the
        model said: the resize rings at edges, and the pipeline's z can come close to 0 there, or below.
        """
        batch_B3HW = torch.cat([each.pixels_13HW for each in batch]).to(self.model.device, self.model.dtype)
        outputs = self.model(pixel_values=batch_B3HW)
        raw_BHW = outputs.predicted_depth.float()
        outputs.predicted_depth = raw_BHW.reciprocal() if self.kind == "metric" else raw_BHW
        results = self.processor.post_process_depth_estimation(outputs, [each.size for each in batch])
        # the reference post-processing squeezes a side of one pixel away
        found = [(each.size, result["predicted_depth"]) for each, result in zip(batch, results, strict=True)]
        return [raw_HW.reshape(size).cpu().numpy() for size, raw_HW in found]


def inv_depth_from_metric(depth_HW: npt.NDArray[Any]) -> TeacherMap:
    """The map of a recorded metric depth image: 1/z, min-max scaled.

    depth_HW: any unit; 0 and +inf stand for "unknown or beyond range" and become inverse depth 0.
    Raises DepthError for NaN, for a negative depth and for a constant map.
    """
    depth_HW = np.asarray(depth_HW, np.float64)
    if np.isnan(depth_HW).any():
        raise DepthError(Reason.NOT_FINITE_DEPTH, f"{int(np.isnan(depth_HW).sum())} pixels of the depth map are NaN")
    if (depth_HW < 0).any():
        message = f"the least depth is {depth_HW.min():g}, expected z > 0, or 0 where it is unknown"
        raise DepthError(Reason.BAD_RECORD, message)
    known_HW = depth_HW > 0
    return scaled_map(np.divide(1.0, depth_HW, out=np.zeros_like(depth_HW), where=known_HW))


def scaled_map(raw_HW: npt.NDArray[np.floating[Any]]) -> TeacherMap:
    """The 16-bit map of a raw inverse depth image (larger = closer, any scale), min-max scaled.

    Raises DepthError when a pixel is not finite or when the map is constant.
    """
    finite = np.isfinite(raw_HW)
    if not finite.all():
        raise DepthError(Reason.NOT_FINITE_DEPTH, f"{int((~finite).sum())} of {raw_HW.size} pixels are not finite")
    low, high = float(raw_HW.min()), float(raw_HW.max())
    if high - low <= FLAT * max(abs(low), abs(high)):
        raise DepthError(Reason.CONSTANT_DEPTH, f"every pixel's inverse depth is {low:g}: nothing is closer or farther")
    scaled_HW = (raw_HW.astype(np.float64) - low) / (high - low)
    return TeacherMap(np.rint(scaled_HW * STEPS).astype(np.uint16), low, high)


def folder_digest(folder: Path) -> str:
    """Hex SHA-256 over a model folder's safetensors and the configs that change its output, names included.

    Raises FileNotFoundError when config.json or every safetensors file is missing.
    """
    names = ["config.json", "preprocessor_config.json"]
    files = [folder / name for name in names if (folder / name).exists()] + sorted(folder.glob("*.safetensors"))
    if not files or files[0].name != "config.json" or files[-1].suffix != ".safetensors":
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder}: found {found}, expected config.json and at least one *.safetensors file")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _slot(raw_HW: npt.NDArray[np.float32]) -> TeacherMap | DepthError:
    """The map, or the error that stands for it, so that one bad image costs its neighbours nothing."""
    try:
        return scaled_map(raw_HW)
    except DepthError as error:
        return error


def _licence(folder: Path) -> str:
    """The licence named by the folder's model card, or "unknown"."""
    card = folder / "README.md"
    return str(ModelCard.load(card).data.get("license") or "unknown") if card.exists() else "unknown"
