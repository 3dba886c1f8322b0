"""Whether a machine's accelerators do what a training asks of them: one command before the first long run on it.

    perceptio doctor --gpu

Reads   nothing
Writes  nothing
Needs   every accelerator of the Ray that it joins or starts

An all-reduce over all of them, a model's numbers in fp32 beside the CPU's and in bf16 beside fp32's, DeepSpeed steps at
ZeRO stage 3, products a second, and the tests that are marked `gpu`. Each line has what was expected beside what came.
The model is an InternVL of random weights: nothing is downloaded.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from perceptio.train.engine import start_engine
from schemas.recipe import Recipe
from workflows import runtime
from workflows.doctor import MissingError

FP32_BOUND, BF16_BOUND = 1e-4, 2e-2  # of the loss, relative: other sums, and 8 bits of mantissa
FASTER = 1.5  # products in bf16 than in fp32, at least, where there are units for it
STEPS = 4
IMAGE_ID, IMAGE_TOKENS, SIDE = 3, 4, 56


@dataclass(frozen=True)
class Check:
    """One line of what is printed."""

    name: str
    expected: str
    seen: str
    passed: bool


@dataclass(frozen=True)
class Size:
    """Of the model and of what is measured on it."""

    width: int = 1024
    layers: int = 12
    tokens: int = 512
    batch: int = 4
    product: int = 8192  # side of the matrices
    reduced_mb: int = 256


SMALL = Size(width=64, layers=2, tokens=32, batch=2, product=256, reduced_mb=1)  # for a test without accelerator


def run(recipe: Recipe) -> None:
    """Prints a line a check; raises MissingError where there is no accelerator, or a check failed."""
    runtime.start(recipe)
    count = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if count == 0:
        raise MissingError("Ray sees no GPU, expected at least one: run on a machine that has one, or set RAY_ADDRESS")
    show([*found(count, Size(), gpu=True), own_tests()])


def found(workers: int, size: Size, *, gpu: bool) -> list[Check]:
    """What so many workers of Ray Train found, each on a device of its own; as rank 0 sees it."""
    work: Any = _work  # Ray gives back what it returns on rank 0, of which its types know nothing
    with tempfile.TemporaryDirectory(prefix="perceptio-doctor-") as folder:
        trainer = TorchTrainer(
            work,
            train_loop_config=asdict(size),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            run_config=RunConfig(name="doctor", storage_path=folder),
        )
        checks: list[Check] = trainer.fit().return_value  # type: ignore[attr-defined]
    return checks


def show(checks: list[Check]) -> None:
    """Prints the checks as a table; raises MissingError where one failed."""
    table = RichTable("check", "expected", "seen", "")
    for check in checks:
        table.add_row(check.name, check.expected, check.seen, "ok" if check.passed else "FAILED")
    Console().print(table)
    if failed := [check.name for check in checks if not check.passed]:
        raise MissingError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def own_tests() -> Check:
    """The project's tests that need an accelerator, in a process of their own."""
    if not (runtime.CHECKOUT / "tests").is_dir():
        return Check("tests marked gpu", "pass", "this is no checkout: there are no tests to run", False)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"],
        cwd=runtime.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = (ended.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    return Check("tests marked gpu", "all pass, none is skipped", last, ended.returncode == 0 and "skipped" not in last)


def _work(config: dict[str, Any]) -> list[Check]:
    size, device = Size(**config), ray.train.torch.get_device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return [reduced(device, size), *numerics(device, size), *products(device, size), *stepped(device, size)]


def reduced(device: torch.device, size: Size) -> Check:
    """The sum of a tensor over all workers, and how fast it came."""
    world = dist.get_world_size()
    values = torch.full((size.reduced_mb * 2**18,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    expected, seen = world * (world + 1) / 2, (values.min().item(), values.max().item())
    _wait(device)
    began = time.perf_counter()
    dist.all_reduce(values)
    _wait(device)
    gigabytes = 2 * (world - 1) / world * size.reduced_mb / 1000  # that each worker sends
    pace = gigabytes / (time.perf_counter() - began)
    return Check(
        f"all-reduce of {size.reduced_mb} MB over {world}",
        f"{expected:g} everywhere",
        f"{seen[0]:g} to {seen[1]:g}, {pace:.1f} GB/s",
        seen == (expected, expected),
    )


def numerics(device: torch.device, size: Size) -> list[Check]:
    """A model's loss in fp32 on the CPU, in fp32 on the device, and in bf16 on the device."""
    model, batch = Loss(size).eval(), example(size)
    with torch.no_grad():
        reference = model(*batch).item()
        moved = [value.to(device) for value in batch]
        single = model.to(device)(*moved).item()
        half = model.to(torch.bfloat16)(*moved).item()
    return [
        _near("loss in fp32 beside the CPU's", reference, single, FP32_BOUND),
        _near("loss in bf16 beside fp32's", single, half, BF16_BOUND),
    ]


def products(device: torch.device, size: Size) -> list[Check]:
    """Matrix products a second in bf16 and fp32."""
    pace = {}
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.randn(size.product, size.product, device=device, dtype=dtype)
        for repeat in range(2):  # the first warms up
            _wait(device)
            began = time.perf_counter()
            for _ in range(STEPS):
                one @ one
            _wait(device)
            if repeat:
                pace[dtype] = STEPS * 2 * size.product**3 / (time.perf_counter() - began) / 1e12
    ratio = pace[torch.bfloat16] / pace[torch.float32]
    seen = f"{pace[torch.bfloat16]:.1f} TFLOP/s in bf16, {pace[torch.float32]:.1f} in fp32: {ratio:.1f} times"
    return [Check("products", f"bf16 at least {FASTER:g} times as fast as fp32", seen, ratio >= FASTER)]


def stepped(device: torch.device, size: Size) -> list[Check]:
    """DeepSpeed steps at ZeRO stage 3 in bf16 on one batch: the first loss, how it falls, and how fast."""
    batch = [value.to(device) for value in example(size)]
    with torch.no_grad():
        expected = Loss(size).to(device)(*batch).item()
    objective = Loss(size)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    config = {
        "train_micro_batch_size_per_gpu": size.batch,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "steps_per_print": 2**31,
    }
    engine = start_engine(objective, optimizer, config)
    losses, began = [], 0.0
    for step in range(STEPS):
        if step == 1:  # the first allocates
            _wait(device)
            began = time.perf_counter()
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    _wait(device)
    tokens = (STEPS - 1) * dist.get_world_size() * size.batch * size.tokens / (time.perf_counter() - began)
    falls = all(later < before for before, later in itertools.pairwise(losses))
    return [
        _near("first loss at ZeRO stage 3 in bf16", expected, losses[0], BF16_BOUND),
        Check(
            f"{STEPS} such steps on one batch",
            "a loss that falls",
            f"{', '.join(f'{loss:.4f}' for loss in losses)}; {tokens:,.0f} tokens/s",
            falls and math.isfinite(losses[-1]),
        ),
    ]


class Loss(nn.Module):
    """Next-token loss of an InternVL of seeded random weights."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads = max(1, size.width // 64)
        text = {"model_type": "qwen2", "vocab_size": 1000, "hidden_size": size.width, "num_hidden_layers": size.layers}
        text |= {"intermediate_size": 4 * size.width, "num_attention_heads": heads, "num_key_value_heads": heads}
        vision: dict[str, Any] = {
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": 2,
        }
        vision |= {"num_attention_heads": heads, "image_size": [SIDE, SIDE], "patch_size": [14, 14]}
        config = InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_ID, image_seq_length=IMAGE_TOKENS
        )
        self.model = InternVLForConditionalGeneration(config)

    def forward(self, ids_BT: Tensor, pixels_B3SS: Tensor) -> Tensor:
        pixels = pixels_B3SS.to(self.model.dtype)
        loss: Tensor = self.model(input_ids=ids_BT, pixel_values=pixels, labels=ids_BT).loss
        return loss


def example(size: Size) -> list[Tensor]:
    """Token ids [B, T], image slots first, and pixels [B, 3, S, S]; the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(IMAGE_ID + 1, 1000, (size.batch, size.tokens), generator=generator)
    ids_BT[:, :IMAGE_TOKENS] = IMAGE_ID
    return [ids_BT, torch.rand(size.batch, 3, SIDE, SIDE, generator=generator)]


def _near(name: str, expected: float, seen: float, bound: float) -> Check:
    off = abs(seen / expected - 1)
    return Check(name, f"{expected:.5f} within {bound:g} of it", f"{seen:.5f}, {off:.1e} off", off <= bound)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
