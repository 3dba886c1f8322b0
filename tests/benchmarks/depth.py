"""The `depth` stage on 2 cores beside a bare loop, with a model of Depth Anything V2-Small's size and random weights.

Both read the same Parquet, decode, run transformers' own processor, model and post-processing on the same batches with
one thread a worker, scale to 16 bits, pack, and write the same Parquet. See `_stage` for the method.
"""

from __future__ import annotations

import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from perceptio.data.images import encode_jpeg
from perceptio.data.maps import pack_map
from schemas.tables import DEPTH, IMAGES
from tests.benchmarks._stage import Make, compare, photographs, put, recipe_at, result
from workflows import depth

SIZE = (252, 336)  # multiples of 14, so that the model takes them as they are
SHARDS, ROWS, BATCH, BAR = 22, 16, 8, 0.95


def write_teacher(folder: Path) -> Path:
    """24.8 M parameters in the layout of Depth Anything V2-Small."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=518,
        patch_size=14,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=384,
        patch_size=14,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
        head_hidden_size=32,
        depth_estimation_type="relative",
    )
    model = DepthAnythingForDepthEstimation(config)
    for weight in (weight for name, weight in model.named_parameters() if weight.ndim > 1 and "backbone" not in name):
        torch.nn.init.kaiming_normal_(weight)  # else every map is flat
    torch.nn.init.constant_(model.get_parameter("head.conv3.bias"), 0.5)
    model.save_pretrained(folder)
    size = {"height": SIZE[0], "width": SIZE[0]}
    processor = DPTImageProcessor(size=size, ensure_multiple_of=14, keep_aspect_ratio=True)
    processor.save_pretrained(folder)
    return folder


def image_rows(encoded: list[bytes], size: tuple[int, int], first: int) -> pa.Table:
    """Rows of the images table."""
    fixed = {"turns": [], "masks": [], "boxes": [], "recorded_depth": None, "height": size[0], "width": size[1]}
    rows = [{"id": f"{first + i:016x}", "uri": f"{first + i}", "image": data} | fixed for i, data in enumerate(encoded)]
    return pa.Table.from_pylist(rows, schema=IMAGES)


def load_bare(folder: Path, batch: int) -> Make:
    """The bare loop of one process."""
    torch.set_num_threads(1)
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def make(read: Path, write: Path) -> None:
        images = pq.read_table(read, columns=["id", "image"]).to_pylist()
        rows: list[dict[str, Any]] = []
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            pictures = [np.array(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in part]
            inputs = processor(images=pictures, input_data_format="channels_last", return_tensors="pt")
            sizes = [picture.shape[:2] for picture in pictures]
            outputs = processor.post_process_depth_estimation(model(**inputs), sizes)
            for row, output in zip(part, outputs, strict=True):
                raw_HW = output["predicted_depth"].numpy()
                low, high = float(raw_HW.min()), float(raw_HW.max())
                steps_HW = np.rint((raw_HW.astype(np.float64) - low) / (high - low) * 65535).astype(np.uint16)
                rows.append({"id": row["id"], "inv_depth": pack_map(steps_HW), "raw_min": low, "raw_max": high})
        pq.write_table(pa.Table.from_pylist(rows, schema=DEPTH), write, compression="zstd")

    return make


def run() -> dict[str, Any]:
    """The benchmark's result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = write_teacher(folder / "teacher")
        encoded = [encode_jpeg(rgb_HW3, 90) for rgb_HW3 in photographs(SHARDS * ROWS, SIZE)]
        put(folder, "images", (image_rows(encoded[i : i + ROWS], SIZE, i) for i in range(0, len(encoded), ROWS)))
        source = {"name": "data", "format": "folder", "path": str(folder)}
        recipe = recipe_at(folder, source, depth__teacher=teacher, depth__batch_size=BATCH)
        load = partial(load_bare, teacher, BATCH)
        rows = compare(folder, "images", "depth", depth.run, recipe, load, ROWS)
    return result("depth", f"depth, 24.8 M parameters at {SIZE[1]} x {SIZE[0]}, of a bare loop's rows/s", BAR, rows)
