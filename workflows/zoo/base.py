"""Trains the small pretrained InternVL that room-scale runs start from, on rooms' questions without spatial tokens.

    python -m workflows.zoo.base --out perceptio/rooms/zoo/base

Reads nothing, needs two CPU threads and about 7 GB. Renders rooms of TRAIN_SEED into a cache; teaches the text model to
answer from exact image tokens, names first; then the vision tower to make these tokens of pixels; then, with that tower
frozen, both together. Many questions about one image in a pack, each blind to the others; loss on answers, and on which
patches a head finds each answer read from. Writes a model folder (fp16 safetensors, tokenizer, processor), `card.json`,
`README.md`.

Shape legend: B packs; T tokens; H, W pixels; G cells of the image grid; P patches; A answers that are boxes; D width
of the text model; S cells that show an object; K kinds; C colours; N numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import InternVLForConditionalGeneration, InternVLProcessor

from perceptio.rooms.questions import FORMS
from perceptio.train.optim import computes_bf16
from perceptio.vlm.backbone import load_backbone
from workflows.zoo.base_heads import AimHead, CellHead, ExactTokens, Sight
from workflows.zoo.base_model import build_model, build_processor, train_tokenizer
from workflows.zoo.base_packs import ANSWERED, Batch, Packer, lesson
from workflows.zoo.base_rooms import TaughtRoom, cached_rooms
from workflows.zoo.base_score import HELD_OUT_SEED, score, write_card
from workflows.zoo.muon import Muon

TRAIN_SEED = 102
SEED = 0
THREADS = 2
LOOK_IMAGES = 16  # a step
LOOKS = ("kind", "color", "corner", "depth", "letter", "mark", "exact")
EXACT_WEIGHT = 5.0
WARM_UP = 0.02
WEIGHT_DECAY = 0.05
REPORT_SECONDS, SAVE_SECONDS = 15, 120


@dataclass
class Clock:
    """How far a run of `seconds` has come, and the learning rate's share of its peak (warm-up, then cosine).

    Counts processor time, so that a busy machine makes a run longer and not worse.
    """

    seconds: float
    start: float

    @property
    def passed(self) -> float:
        return (time.process_time() - self.start) / self.seconds

    @property
    def rate(self) -> float:
        return min(self.passed / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(self.passed, 1.0)))


def see(model: InternVLForConditionalGeneration, batch: Batch) -> Sight:
    """The vision tower and the projector on a batch."""
    features = model.model.get_image_features(pixel_values=batch.pixel_B3HW)
    return Sight(features.pooler_output, features.last_hidden_state[:, 1:])


def text_states(model: InternVLForConditionalGeneration, image_BGD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, T, D]: the text model's last states. What may attend to what, the packs say."""
    embeds_BTD = model.get_input_embeddings()(batch.ids_BT)
    at_image_BT1 = (batch.ids_BT == model.config.image_token_id)[..., None]
    embeds_BTD = embeds_BTD.masked_scatter(at_image_BT1, image_BGD.to(embeds_BTD.dtype))
    states: torch.Tensor = model.model.language_model(
        inputs_embeds=embeds_BTD,
        attention_mask=batch.sees_B1TT,
        position_ids=batch.positions_BT,
        use_cache=False,
    ).last_hidden_state
    return states


def answer_loss(
    model: InternVLForConditionalGeneration, image_BGD: torch.Tensor, batch: Batch, head: AimHead
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of answers plus the head's loss, and both by name: the former by kind of question.

    An answer counts once, however long: else boxes, of eleven tokens each, drown the single words.
    """
    states_BTD = text_states(model, image_BGD, batch)
    taught_BT = batch.labels_BT[:, 1:] >= 0
    share_N, kind_N = batch.share_BT[:, 1:][taught_BT], batch.kind_BT[:, 1:][taught_BT]
    logits_NV = model.lm_head(states_BTD[:, :-1][taught_BT]).float()
    loss_N = share_N * F.cross_entropy(logits_NV, batch.labels_BT[:, 1:][taught_BT], reduction="none")
    aims = head.loss(states_BTD, batch)
    sum_K, answers_K = (torch.bincount(kind_N, v.detach(), len(ANSWERED)) for v in (loss_N, share_N))
    terms = {kind: (sum_K[k] / answers_K[k]).item() for k, kind in enumerate(ANSWERED) if answers_K[k]}
    return loss_N.sum() / share_N.sum() + aims, terms | {"aims": aims.item()}


def optimizers(parts: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms, biases and the rest, of what trains in `parts`."""
    named = {id(p): (name, p) for part in parts for name, p in part.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.values() if p.ndim == 2 and "layer" in name and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for key, (_, p) in named.items() if key not in chosen]
    return [
        Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def learn_to_reason(
    model: InternVLForConditionalGeneration, exact: ExactTokens, packer: Packer, minutes: float, rate: float, packs: int
) -> int:
    """The number of steps in which the text model learnt to answer from exact tokens; in place.

    Lesson by lesson: where all kinds of questions are asked from the start, none is learnt for a long time.
    """
    head = AimHead(model)

    def loss(passed: float) -> tuple[torch.Tensor, dict[str, float]]:
        packer.shares = lesson(passed)
        batch = packer.batch(packs)
        return answer_loss(model, exact(batch.token_BG9, batch.letter_BG2), batch, head)

    return _repeat(loss, optimizers([model.model.language_model, exact, head], rate), minutes, rate, lambda: None)


def learn_to_look(
    model: InternVLForConditionalGeneration, exact: ExactTokens, packer: Packer, minutes: float, rate: float
) -> int:
    """The number of steps in which vision tower and projector learnt to make the exact tokens of pixels; in place."""
    head = CellHead(model, packer.processor)
    exact.requires_grad_(False)
    head.words.requires_grad_(False)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, head]

    def loss(_: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch = packer.looks(LOOK_IMAGES)
        sight, wanted_BGD = see(model, batch), exact(batch.token_BG9, batch.letter_BG2)
        missed = F.mse_loss(sight.token_BGD.float(), wanted_BGD) / wanted_BGD.var((0, 1)).mean()
        terms_7 = torch.cat([head.loss(sight, batch), EXACT_WEIGHT * missed[None]])
        return terms_7.sum(), dict(zip(LOOKS, terms_7.tolist(), strict=True))

    steps = _repeat(loss, optimizers(parts, rate), minutes, rate, lambda: None)
    head.words.requires_grad_(True)
    return steps


def learn_to_answer(
    model: InternVLForConditionalGeneration,
    packer: Packer,
    minutes: float,
    rate: float,
    packs: int,
    out: Path,
) -> int:
    """The number of steps in which text model and projector learnt to answer from pixels; in place, saved at times."""
    model.model.vision_tower.requires_grad_(False)
    head = AimHead(model)

    def loss(_: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch = packer.batch(packs)
        return answer_loss(model, see(model, batch).token_BGD, batch, head)

    groups = optimizers([model, head], rate)
    return _repeat(loss, groups, minutes, rate, lambda: save(model, packer.processor, out))


def _repeat(
    loss: Callable[[float], tuple[torch.Tensor, dict[str, float]]],
    groups: list[torch.optim.Optimizer],
    minutes: float,
    rate: float,
    keep: Callable[[], None],
) -> int:
    """Optimizer steps for so many minutes of processor time; the number of them."""
    parameters = [p for group in groups for g in group.param_groups for p in g["params"]]
    clock, step, reported, saved = Clock(minutes * 60, time.process_time()), 0, 0.0, time.monotonic()
    recent: dict[str, list[float]] = defaultdict(list)
    bf16 = computes_bf16(torch.device("cpu"))
    while clock.passed < 1:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value, found = loss(clock.passed)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in groups:
            for g in optimizer.param_groups:
                g["lr"] = rate * clock.rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        for name, term in found.items():
            recent[name].append(term)
        if time.monotonic() - reported > REPORT_SECONDS:
            means = " ".join(f"{name} {np.mean(terms):.3f}" for name, terms in recent.items())
            print(f"step {step}, {clock.passed:.1%}: {means}", flush=True)
            recent.clear()
            reported = time.monotonic()
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
            saved = time.monotonic()
    return step


def save(model: InternVLForConditionalGeneration, processor: InternVLProcessor, out: Path) -> None:
    """Writes the model folder, weights in fp16; `model` itself stays in fp32."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(out, state_dict=state)
    processor.save_pretrained(out)


def corpus(rooms: list[TaughtRoom]) -> Iterator[str]:
    """What the tokenizer is learnt from: chats, and the forms in which a mask will be asked for."""
    for n, room in enumerate(rooms):
        for turn in (*itertools.chain(*room.turns.values()), *(points.turn for points in room.points)):
            yield from ("user\n", turn.prompt, "assistant\n", turn.answer)
        for turn in room.turns.get("name", ())[:1]:
            yield FORMS[n % len(FORMS)].format(turn.prompt.removeprefix("Where is ").rstrip("?"))


def _taught(
    model: InternVLForConditionalGeneration, exact: ExactTokens, packer: Packer, args: argparse.Namespace
) -> dict[str, float]:
    """Reasoning, then looking, each kept in the cache as it ends; with --after what went before comes from there.

    Returns minutes and counts of both.
    """
    both, done = nn.ModuleDict({"model": model, "exact": exact}), dict[str, float]()
    if args.after:
        kept = args.cache / f"{args.after}.safetensors"
        load_model(both, kept)
        with safe_open(kept, "pt") as file:
            done = json.loads(file.metadata()["done"])
    if args.after is None:
        steps = learn_to_reason(model, exact, packer, args.reason_minutes, args.rate, args.packs)
        done |= {"reason_minutes": args.reason_minutes, "reasoned": args.packs * steps}
        save_model(both, str(args.cache / "reason.safetensors"), {"done": json.dumps(done)})
    if args.after != "look":
        steps = learn_to_look(model, exact, packer, args.look_minutes, args.rate)
        done |= {"look_minutes": args.look_minutes, "looks": LOOK_IMAGES * steps}
        save_model(both, str(args.cache / "look.safetensors"), {"done": json.dumps(done)})
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--reason-minutes", type=float, default=42, help="of answering from exact tokens, processor time"
    )
    parser.add_argument("--look-minutes", type=float, default=36, help="of learning to look, in processor time")
    parser.add_argument("--minutes", type=float, default=20, help="of answering from pixels, in processor time")
    parser.add_argument(
        "--after", choices=["reason", "look"], help="go on after this part of an earlier run, kept in --cache"
    )
    parser.add_argument("--more", action="store_true", help="go on from the model in --out: answers only")
    parser.add_argument("--score", action="store_true", help="score the model in --out again, without training")
    parser.add_argument("--rooms", type=int, default=6000, help="rooms to learn from")
    parser.add_argument("--held-out", type=int, default=240, help=f"rooms of seed {HELD_OUT_SEED} to score on")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--packs", type=int, default=8, help="images a step of learning to answer")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "perceptio-zoo-base")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    known = args.more or args.score
    runs: list[dict[str, float]] = json.loads((args.out / "card.json").read_text())["runs"] if known else []
    if not args.score:
        torch.manual_seed(SEED + len(runs))
        rooms = list(cached_rooms(args.cache, TRAIN_SEED, args.rooms))
        run: dict[str, float] = {"rooms": len(rooms), "rate": args.rate}
        if args.more:
            model, processor = load_backbone(args.out, dtype=torch.float32)
        else:
            processor = build_processor(train_tokenizer(corpus(rooms[:1000])))
            model = build_model(processor.tokenizer)
        packer = Packer(processor, rooms, np.random.default_rng(SEED + len(runs)))
        model.train()
        if not args.more:
            run |= _taught(model, ExactTokens(model, processor), packer, args)
        run["minutes"] = args.minutes
        run["packs"] = args.packs * learn_to_answer(model, packer, args.minutes, args.rate, args.packs, args.out)
        save(model, processor, args.out)
        runs.append(run)
    write_card(args.out, score(args.out, range(args.held_out)), runs)


if __name__ == "__main__":
    main()
