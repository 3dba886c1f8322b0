"""Codes are the same whatever the batch, decoding is bounded, soft merging is differentiable and ends in hard codes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from perceptio.depth.codebook import CodebookConfig, DepthCodebook
from perceptio.depth.codec import ENCODE_BATCH, DepthCodec

CONFIG = CodebookConfig(image_size=16, codes=6, dim=8, channels=(8, 8), residual_blocks=1, gradient_weight=0.5)


def maps(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(count))


def trained() -> DepthCodebook:
    """A codebook after a few steps on noise: its codes are set and its weights are not the initial ones."""
    torch.manual_seed(0)
    codebook = DepthCodebook(CONFIG).train()
    optimizer = torch.optim.Adam(codebook.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        codebook(maps(12)).losses["total"].backward()
        optimizer.step()
    codebook.zero_grad()
    return codebook


@pytest.fixture
def codec() -> DepthCodec:
    return DepthCodec(trained())


def test_codes_and_maps_have_the_contracts_shape_and_range(codec: DepthCodec) -> None:
    codes = codec.encode(maps(3, size=37))
    assert codes.shape == (3, codec.tokens) == (3, 16)
    assert codec.grid == (4, 4)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < CONFIG.codes
    picture = codec.decode(codes)
    assert picture.shape == (3, 16, 16)
    assert picture.min() >= 0 and picture.max() <= 1


def test_training_makes_the_reconstruction_better() -> None:
    torch.manual_seed(0)
    codebook = DepthCodebook(CONFIG).train()
    ramps = torch.linspace(0, 1, 16).expand(8, 16, 16) * torch.linspace(0.2, 1, 8)[:, None, None]
    optimizer = torch.optim.Adam(codebook.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        found = codebook(ramps).losses
        found["total"].backward()
        optimizer.step()
        losses.append(found["mse"].item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_maps_codes_do_not_depend_on_its_batch(codec: DepthCodec) -> None:
    many = maps(2 * ENCODE_BATCH + 3)
    z = torch.cat([codec.codebook.features(many[i : i + 1].expand(ENCODE_BATCH, -1, -1))[:1] for i in range(len(many))])
    together = codec.encode(many)
    assert torch.equal(together, torch.cat([codec.encode(one[None]) for one in many]))
    assert torch.equal(together, codec.encode(many.flip(0)).flip(0))
    assert torch.equal(together, codec.codebook.nearest(z))
    assert codec.encode(many[:0]).shape == (0, codec.tokens)


def test_at_full_size_no_code_flips_with_batch_order_or_threads(record_property: Callable[[str, object], None]) -> None:
    torch.manual_seed(0)
    codebook = DepthCodebook(CodebookConfig()).train()
    side = codebook.config.image_size
    ramps = torch.linspace(0, 1, side).expand(12, side, side) * torch.linspace(0.2, 1, 12)[:, None, None]
    many = torch.cat([ramps, maps(4, size=side), (ramps[:2] + 0.05 * maps(2, size=side)).clamp(0, 1)])
    with torch.no_grad():
        codebook(many)  # k-means: every code is some map's
    codec = DepthCodec(codebook)
    together = codec.encode(many)
    order = torch.randperm(len(many))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    others = [codec.encode(many)]
    torch.set_num_threads(threads)
    others += [torch.cat([codec.encode(part) for part in many.split(size)]) for size in (1, 3)]
    others += [codec.encode(many[order])[order.argsort()]]
    flips = [int((codes != together).sum()) for codes in others]
    record_property("flips", flips)
    assert len(together.unique()) > 32, "few codes in use: too easy"
    assert flips == [0, 0, 0, 0], f"of {together.numel()} codes each"


def test_encoding_ignores_autocast_and_refuses_half_precision(codec: DepthCodec) -> None:
    expected = codec.encode(maps(20))
    logits_BNK = torch.randn(2, codec.tokens, codec.codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(maps(20)), expected)
        assert codec.decode(expected).dtype == torch.float32
        rough = codec.decode_soft(logits_BNK, 1.25)
    torch.testing.assert_close(rough, codec.decode_soft(logits_BNK, 1.25), rtol=0, atol=0)
    codec.codebook.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"bfloat16, expected float32"):
        codec.encode(maps(1))


def test_nothing_to_encode_or_decode_gives_nothing(codec: DepthCodec) -> None:
    codes = codec.encode(maps(0))
    assert codes.shape == (0, codec.tokens)
    assert codec.decode(codes).shape == (0, codec.size, codec.size)
    assert codec.decode_soft(torch.zeros(0, codec.tokens, codec.codes), 1.0).shape == (0, codec.size, codec.size)
    with pytest.raises(ValueError, match=r"\(1, 0, 5\), expected maps of at least one pixel"):
        codec.encode(torch.zeros(1, 0, 5))


@pytest.fixture
def coarse_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("coarse_products")
def test_products_are_told_not_to_use_tf32_where_the_host_does(codec: DepthCodec) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    assert matmul.fp32_precision == "tf32"
    for part in (codec.codebook.quantizer, codec.codebook.decoder):
        part.register_forward_pre_hook(lambda *_: seen.append(matmul.fp32_precision))
    codec.decode(codec.encode(maps(2)))
    assert seen == ["ieee", "ieee"]
    assert matmul.fp32_precision == "tf32", "the host's choice stands again"


def test_convolutions_are_told_not_to_use_tf32(codec: DepthCodec) -> None:
    cudnn, seen = torch.backends.cudnn, []
    assert cudnn.allow_tf32, "torch's default, which a GPU would follow"
    for module in codec.codebook.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_pre_hook(lambda *_: seen.append((cudnn.allow_tf32, cudnn.deterministic)))
    codes = codec.encode(maps(2))
    encoding = len(seen)
    codec.decode(codes)
    codec.decode_soft(torch.zeros(1, codec.tokens, codec.codes), 1.25)
    assert 0 < encoding < len(seen)
    assert set(seen) == {(False, True)}
    assert (cudnn.allow_tf32, cudnn.deterministic) == (True, False)


def test_a_code_stands_for_its_nearest_vector(codec: DepthCodec) -> None:
    z = codec.codebook.features(codec.resize(maps(5)))
    distance = torch.cdist(z, codec.vectors_KD.expand(5, -1, -1))
    assert torch.equal(codec.encode(maps(5)), distance.argmin(dim=-1))


def test_encoding_and_decoding_leave_the_codebook_as_it_is(codec: DepthCodec) -> None:
    codec.decode(codec.encode(maps(30)))
    assert codec.codebook.digest == codec.digest


def test_soft_merging_tends_to_hard_decoding(codec: DepthCodec) -> None:
    logits = torch.randn(4, codec.tokens, codec.codes, generator=torch.Generator().manual_seed(1))
    hard = codec.decode(logits.argmax(dim=-1))
    gaps = [(codec.decode_soft(logits, t) - hard).abs().max().item() for t in (1.25, 0.1, 1e-4)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_gradients_reach_the_logits_and_not_the_codebook() -> None:
    codec = DepthCodec(trained().double())
    logits = torch.randn(1, codec.tokens, codec.codes, dtype=torch.float64, requires_grad=True)
    inside = codec.decode_soft(logits, 1.25)
    assert inside.min() > 0 and inside.max() < 1  # nothing clamped, so that the derivative exists everywhere
    assert torch.autograd.gradcheck(lambda x: codec.decode_soft(x, 1.25), logits)
    codec.decode_soft(logits, 1.25).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in codec.codebook.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 16, 16), 1.5), r"\[1\.5, 1\.5\], expected finite values in \[0, 1\]"),
        (torch.full((1, 16, 16), -0.25), r"\[-0\.25, -0\.25\], expected finite"),
        (torch.full((1, 16, 16), float("nan")), r"\[nan, nan\], expected finite"),
        (torch.rand(16, 16), r"shape \(16, 16\), expected three dimensions"),
    ],
)
def test_maps_outside_the_convention_are_refused(codec: DepthCodec, bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(bad)


def test_foreign_codes_and_logits_are_refused_with_both_values(codec: DepthCodec) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 6, expected 0 \.\. 5"):
        codec.decode(torch.arange(codec.tokens)[None] % 7)
    with pytest.raises(ValueError, match=r"-1 \.\. 0, expected 0 \.\. 5"):
        codec.decode(torch.tensor([[-1] + [0] * 15]))
    with pytest.raises(ValueError, match=r"shape \(1, 15\), expected \(B, 16\)"):
        codec.decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(1, 16, 7\), expected \(B, 16, 6\)"):
        codec.decode_soft(torch.zeros(1, 16, 7), 1.0)
    with pytest.raises(ValueError, match=r"temperature is 0, expected > 0"):
        codec.decode_soft(torch.zeros(1, 16, 6), 0)


def test_an_untrained_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="codes are unset"):
        DepthCodec(DepthCodebook(CONFIG))


def test_a_saved_codebook_comes_back_identical(codec: DepthCodec, tmp_path: Path) -> None:
    codec.codebook.save_pretrained(tmp_path)
    again = DepthCodec.from_pretrained(tmp_path)
    assert again.digest == codec.digest
    assert again.codebook.config == CONFIG
    assert torch.equal(again.encode(maps(9)), codec.encode(maps(9)))
    assert torch.equal(again.decode(codec.encode(maps(9))), codec.decode(codec.encode(maps(9))))


def test_the_digest_names_weights_and_config(codec: DepthCodec) -> None:
    before = codec.codebook.digest
    with torch.no_grad():
        codec.codebook.vectors_KD[0, 0] += 1e-6
    assert codec.codebook.digest != before


def test_a_folder_of_another_release_is_refused(codec: DepthCodec, tmp_path: Path) -> None:
    codec.codebook.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"codes"', '"code_count"'))
    with pytest.raises(ValueError, match="code_count"):
        DepthCodebook.from_pretrained(tmp_path)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size is 18, expected a positive multiple of stride 4"):
        CodebookConfig(image_size=18, channels=(8, 8))


def test_the_default_is_the_full_size_of_the_method() -> None:
    config = CodebookConfig()
    assert (config.stride, config.grid, config.codes, config.dim) == (32, 10, 128, 512)
