"""ZeRO's stages: ranks that lack masks, depth or images move every weight as one process with all samples does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import spawn

from tests.batches import BOTH, DEPTH, MASKS, WORDS
from tests.tiny import tiny_parts
from tests.zero import Micro, Run, trained

ROWS = {"padded": None, "packed": 200}  # tokens of a row
WAYS = (("padded", 1), ("padded", 2), ("padded", 3), ("packed", 3))  # rows, and ZeRO's stage
# A global batch is micro-batches: one process reads all, or two ranks read half each.
GLOBAL_BATCHES = {
    "masks and depth beside words": (
        Micro(((0, BOTH), (2, BOTH))),
        Micro(((4, DEPTH), (6, WORDS))),
        Micro(((1, WORDS), (3, WORDS))),
        Micro(((5, WORDS), (7, WORDS))),
    ),
    "masks beside depth": (Micro(((0, MASKS), (2, MASKS))), Micro(((1, DEPTH), (3, DEPTH)))),
    "images beside none": (Micro(((0, BOTH), (2, BOTH))), Micro(((1, WORDS), (3, WORDS)), images=False)),
}
IN_BF16 = "masks and depth beside words"
SMALL = "masks beside depth"  # what is tried in further ways
LINEAGE_PARTS = (".multi_modal_projector.", ".embed_tokens.", ".lora_A.", ".lora_B.", "lm_head.", ".sam_mask_decoder.")
PARTS = (".vision_tower.", ".multi_modal_projector.", ".embed_tokens.", ".layers.", ".projector.", ".sam_mask_decoder.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process ends with on each global batch (alone/), and what two do in every way (together/)."""
    folder = tmp_path_factory.mktemp("runs")
    llama = tiny_parts(folder / "llama", text_model="llama", tied=False)
    parts = {False: tiny_parts(folder / "parts"), True: llama}
    alone, together = [], []
    for (name, micros), (how, packed_to) in product(GLOBAL_BATCHES.items(), ROWS.items()):
        alone.append(Run(f"{name}-{how}", 1, (micros,), packed_to))
        half = len(micros) // 2
        split = (micros[:half], micros[half:])
        together += [Run(f"{name}-{how}-{stage}", stage, split, packed_to) for rows, stage in WAYS if rows == how]
        if name == IN_BF16 and packed_to is None:
            together += [Run(f"bf16-{stage}", stage, split, bf16=True) for stage in (1, 2, 3)]
    micros = GLOBAL_BATCHES[SMALL]
    split = (micros[:1], micros[1:])
    together += [Run(f"offload-{stage}", stage, split, offload=True) for stage in (2, 3)]
    together += [Run(f"spoilt-{stage}", stage, split, spoilt=True) for stage in (1, 2, 3)]
    together += [Run(f"lineage-{stage}", stage, split, lineage=True) for stage in (2, 3)]
    alone.append(Run("lineage", 1, (micros,), lineage=True))
    for world, runs in (("alone", alone), ("together", together)):
        (folder / world).mkdir()
        spawn(trained, (runs, parts, folder / world), nprocs=len(runs[0].shares))
    return folder


@pytest.mark.parametrize(("how", "stage"), WAYS)
@pytest.mark.parametrize("name", GLOBAL_BATCHES)
def test_what_a_rank_lacks_changes_nothing(folder: Path, name: str, how: str, stage: int) -> None:
    compare(folder, f"{name}-{how}", f"{name}-{how}-{stage}", PARTS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_with_a_loss_that_is_no_number_changes_nothing_on_any_rank(folder: Path, stage: int) -> None:
    compare(folder, f"{SMALL}-padded", f"spoilt-{stage}", PARTS)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_waits_in_the_cpus_memory_moves_alike(folder: Path, stage: int) -> None:
    compare(folder, f"{SMALL}-padded", f"offload-{stage}", PARTS)


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_and_what_else_trains_by_default_move_alike(folder: Path, stage: int) -> None:
    compare(folder, "lineage", f"lineage-{stage}", LINEAGE_PARTS)


def compare(folder: Path, alone: str, together: str, parts: Sequence[str]) -> None:
    expected = load_file(folder / "alone" / f"{alone}-0.safetensors")
    assert torch.isfinite(expected["losses"]).all()
    assert expected["losses"][1, 0] < expected["losses"][0, 0]
    starts = {key.removeprefix("start."): start for key, start in expected.items() if key.startswith("start.")}
    moved = [key for key, start in starts.items() if not torch.equal(expected[key], start)]
    assert [part for part in parts if not any(part in key for key in moved)] == []
    for rank in range(2):
        found = load_file(folder / "together" / f"{together}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for key in ("losses", "gradient_norms"):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)
        for key, start in starts.items():
            move, expected_move = found[key] - start, expected[key] - start
            allowed = 1e-4 * expected_move.norm() + 3e-7 * start.norm()  # what the weights' own rounding makes
            assert (move - expected_move).norm() <= allowed, key


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_in_bf16_move_as_those_in_fp32(folder: Path, stage: int) -> None:
    exact = load_file(folder / "alone" / f"{IN_BF16}-padded-0.safetensors")
    ends = [load_file(folder / "together" / f"bf16-{stage}-{rank}.safetensors") for rank in range(2)]
    for end in ends:
        torch.testing.assert_close(end["losses"], exact["losses"], atol=2e-2, rtol=2e-2)
    for part in PARTS:
        keys = [key for key in exact if part in key and f"start.{key}" in exact]
        starts = [exact[f"start.{key}"] for key in keys]
        expected = torch.cat([(exact[key] - start).flatten() for key, start in zip(keys, starts, strict=True)])
        for end in ends:  # fp32 masters, which start as what is left of a weight in bf16
            moves = [end[key] - start.bfloat16().float() for key, start in zip(keys, starts, strict=True)]
            move = torch.cat([part_of.flatten() for part_of in moves])
            assert torch.cosine_similarity(move, expected, 0) > 0.998, part
            assert move.norm().item() == pytest.approx(expected.norm().item(), rel=0.02), part
