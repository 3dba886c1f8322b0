"""A training that was interrupted ends as if it was not; codes start on the data, and dead ones come back to it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codebook_state import BEST, CURRENT, OPTIMIZER, Progress, StateError, load_progress, save_progress
from perceptio.depth.codebook_training import WARM_UP, Plan, Share, batch_rows, learn, measure, rate

CONFIG = CodebookConfig(image_size=16, codes=16, dim=8, channels=(8, 8), residual_blocks=1, gradient_weight=0.1)
RESTLESS = replace(CONFIG, dead_below=8.0)  # some code is restarted at nearly every step
PLAN = Plan(steps=40, batch=8, learning_rate=5e-3, seed=3, checkpoint_every=5)
QUANTIZING_FROM = int(WARM_UP * PLAN.steps)


class StopError(Exception):
    """The training dies here."""


def slopes(rows: int, seed: int) -> torch.Tensor:
    """Planes of every slope and level in 16 bits, (rows, 16, 16)."""
    random = torch.Generator().manual_seed(seed)
    across, down, level = torch.rand(3, rows, 1, 1, generator=random)
    ramp = torch.linspace(-0.5, 0.5, 16)
    planes = level + (across - 0.5) * ramp[None, None] + (down - 0.5) * ramp[None, :, None]
    return (planes.clamp(0, 1) * 65535).round().to(torch.uint16)


SHARE = Share(slopes(30, seed=1), slopes(12, seed=2), tuple(f"rooms/{n}" for n in range(12)))


def untrained(config: CodebookConfig = CONFIG, seed: int = 0) -> tuple[DepthCodebook, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    codebook = DepthCodebook(config)
    return codebook, torch.optim.Adam(codebook.parameters())


def trained(folder: Path, die_at: int | None = None) -> tuple[DepthCodebook, Progress]:
    """A training from the start that saves into `folder`, and dies right after it saved step `die_at`."""
    codebook, optimizer = untrained(RESTLESS)
    progress = Progress()

    def save(progress: Progress) -> None:
        save_progress(folder, codebook, optimizer, progress)
        if progress.step == die_at:
            raise StopError

    learn(codebook, codebook, optimizer, SHARE, PLAN, progress, save)
    return codebook, progress


def test_every_pass_has_every_row_once_and_a_batch_depends_on_its_step_alone() -> None:
    rows = torch.cat([batch_rows(7, 3, seed=1, rank=0, step=step) for step in range(14)])  # six passes of seven
    passes = rows.reshape(6, 7)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(7).expand(6, 7))
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(batch_rows(7, 3, seed=1, rank=0, step=9), rows[27:30])
    assert not torch.equal(torch.cat([batch_rows(7, 7, 1, 1, step) for step in range(6)]), rows)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rates = [rate(step, 400) for step in range(400)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == rates[19] > 0.98
    assert rates[19:] == sorted(rates[19:], reverse=True) and rates[-1] < 1e-4


@pytest.mark.parametrize("step", [5, QUANTIZING_FROM + 2, 20, 35])  # before k-means, after it, and between measures
def test_a_resumed_training_ends_with_the_codebook_of_an_undisturbed_one(tmp_path: Path, step: int) -> None:
    undisturbed, expected = trained(tmp_path)
    with pytest.raises(StopError):
        trained(tmp_path, die_at=step)
    codebook, optimizer = untrained(RESTLESS, seed=99)
    progress = load_progress(tmp_path, codebook, optimizer)
    assert (progress.step, progress.resumed_at) == (step, [step])
    assert codebook.digest != undisturbed.digest
    torch.manual_seed(12345)
    learn(codebook, codebook, optimizer, SHARE, PLAN, progress, lambda progress: None)
    assert codebook.digest == undisturbed.digest
    assert (progress.figures, progress.history) == (expected.figures, expected.history)
    assert progress.best is not None and expected.best is not None
    assert all(torch.equal(tensor, expected.best[name]) for name, tensor in progress.best.items())


def test_the_best_weights_are_those_with_the_lowest_held_out_error(tmp_path: Path) -> None:
    codebook, progress = trained(tmp_path)
    assert progress.best is not None
    codebook.load_state_dict(progress.best)
    found = measure(codebook, SHARE.held_out_RSS)
    assert found.figures["mae"] == min(line["mae"] for line in progress.history) == progress.figures["mae"]
    assert found.figures["mae"] == pytest.approx(found.errors_R.mean().item())
    assert found.counts_K.sum() == len(SHARE.held_out_RSS) * CONFIG.grid**2
    assert found.figures["usage"] == (found.counts_K > 0).float().mean().item()


def test_a_saved_state_is_tensors_and_json(tmp_path: Path) -> None:
    trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CURRENT, OPTIMIZER, BEST, "state.json"}


@pytest.mark.parametrize("name", [CURRENT, OPTIMIZER, BEST])
def test_a_damaged_or_missing_file_is_named_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    trained(tmp_path)
    codebook, optimizer = untrained(RESTLESS, seed=5)
    before = codebook.digest
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StateError, match=f"{name} has sha256"):
        load_progress(tmp_path, codebook, optimizer)
    (tmp_path / name).unlink()
    with pytest.raises(StateError, match=f"{name} is missing"):
        load_progress(tmp_path, codebook, optimizer)
    assert codebook.digest == before


def test_a_torn_list_and_another_codebooks_state_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    codebook, optimizer = untrained(replace(RESTLESS, codes=8))
    with pytest.raises(StateError, match="of another codebook"):
        load_progress(tmp_path, codebook, optimizer)
    text = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(text[: len(text) // 2])
    with pytest.raises(StateError, match=r"state\.json is not JSON"):
        load_progress(tmp_path, codebook, optimizer)
    (tmp_path / "state.json").unlink()
    with pytest.raises(StateError, match=r"state\.json is missing"):
        load_progress(tmp_path, codebook, optimizer)


def test_codes_start_on_the_features_and_nowhere_else() -> None:
    codebook, _ = untrained()
    maps = SHARE.train_RSS.float() / 65535
    codebook(maps, quantize=False)
    assert not codebook.is_set
    z = codebook.features(maps).detach().flatten(0, 1)
    codebook(maps)
    assert codebook.is_set
    spread = torch.cdist(z, z.mean(dim=0, keepdim=True)).mean()
    assert torch.cdist(codebook.vectors_KD, z).min(dim=1).values.max() < 0.5 * spread


def kill_code(codebook: DepthCodebook) -> torch.Tensor:
    """Moves code 0 to where no feature is and makes its count that of a code long unused; its vector there."""
    far = torch.full((CONFIG.dim,), 1e3)
    inside = codebook.quantizer._codebook
    with torch.no_grad():
        inside.embed[0, 0], inside.embed_avg[0, 0], inside.cluster_size[0, 0] = far, far * 0.1, 0.1
    return far


@pytest.mark.parametrize(("dead_below", "comes_back"), [(1.0, True), (0.0, False)])
def test_a_dead_code_comes_back_to_the_features(dead_below: float, comes_back: bool) -> None:
    codebook, _ = untrained(replace(CONFIG, dead_below=dead_below))
    maps = SHARE.train_RSS.float() / 65535
    codebook(maps)
    far = kill_code(codebook)
    codebook(maps)
    z = codebook.features(maps).detach().flatten(0, 1)
    distance = torch.cdist(codebook.vectors_KD[:1], z).min().item()
    assert (distance < 1e-3) == comes_back
    assert (codebook.vectors_KD[0] > far / 2).all() != comes_back


def test_start_and_restart_keep_more_codes_in_use_than_codes_laid_out_blindly() -> None:
    plan = replace(PLAN, steps=200)
    codebook, ours_optimizer = untrained()
    learn(codebook, codebook, ours_optimizer, SHARE, plan, Progress(), lambda progress: None)
    blind, optimizer = untrained(replace(CONFIG, dead_below=0.0))
    inside = blind.quantizer._codebook
    with torch.no_grad():
        vectors = torch.randn(CONFIG.codes, CONFIG.dim, generator=torch.Generator().manual_seed(0))
        inside.embed[0], inside.embed_avg[0] = vectors, vectors
        inside.initted.fill_(True)
    learn(blind, blind, optimizer, SHARE, plan, Progress(), lambda progress: None)
    ours, theirs = (measure(one, SHARE.held_out_RSS).figures for one in (codebook, blind))
    assert ours["usage"] > 0.7 > 0.4 > theirs["usage"]
    assert ours["perplexity"] > theirs["perplexity"]
