"""A samples row as a dialogue: prompts and replies as token ids, with the loss that each position belongs to.

    system     segmentation: on, depth: on
    user       <image> What colour is the lamp?
    assistant  [SEG] x objects, <|depth_start|> codes <|depth_end|>, text

The system line says which parts the reply has, so that a user can ask for them: "on", "off", or "auto", which leaves it
to the model (reconstruction; the number of objects is never told). The spatial block stands once, in the first reply
about an image (paper: the order; lineage: one [SEG] per object). Training, evaluation and serving build their prompts
here. The chat template is the tokenizer's own; replies are put together by ids, so that what is supervised is exact.
Words are encoded apart from the template, as plain text: what they spell is never a marker, an image or a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from perceptio.data.masks import box_within, rle_to_mask
from perceptio.vocabulary import SpatialVocabulary
from schemas.recipe import MixtureEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["auto", "on", "off"]

DEPTH_PROMPTS = (
    "Describe the depth of this image.",
    "Estimate the depth of this image.",
    "How far away is everything in this image? Answer with a depth map.",
    "Give me a depth map of this image.",
    "Please show the depth of this picture.",
)
DEPTH_ANSWER = "Done."
# a tokenizer keeps `split_special_tokens` as a state of its own, which another thread's call would change in between
_ENCODING = threading.Lock()
_QUESTION, _REPLY = "\x00question\x00", "\x00reply\x00"  # stand for words while the chat template is applied


class LossKind(IntEnum):
    """Which loss the token at a position belongs to, as a target: it is predicted from the position before it."""

    IGNORE = 0  # prompts and padding
    TEXT = 1  # [SEG], words, end of turn
    MARKER = 2  # start and end of the depth block
    TOKEN = 3  # depth codes


@dataclass(frozen=True)
class Dialogue:
    """A whole training dialogue about one image. `loss_kinds[t]` is about `target_ids[t]`."""

    sample_id: str
    input_ids: tuple[int, ...]  # what is read: the targets, but for depth codes that noise has replaced
    target_ids: tuple[int, ...]  # what is to be written
    loss_kinds: tuple[LossKind, ...]
    image_tokens: int  # slots that the image features fill
    seg_positions: tuple[int, ...]  # where [SEG] is the input
    objects: tuple[int, ...]  # index into the row's masks, for each [SEG]
    codes: tuple[int, ...]  # of the depth block; () where there is none
    turns: tuple[int, ...]  # indices of the row's turns that were used; () where only depth is described


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    segmentation: Part,
    depth: Part,
    image_tokens: int,
    history: Sequence[tuple[str, Sequence[int]]] = (),
) -> list[int]:
    """Token ids up to where the reply begins; `image_tokens` counts the image's features over all its tiles.

    `history` holds the earlier questions about the image, each with the ids of its reply (spatial block included, end
    of turn not). A control token that a question spells is plain text. Raises ValueError for a tokenizer without a
    ChatML template or image tokens.
    """
    questions = [*(asked for asked, _ in history), question]
    prompts = _prompts(tokenizer, questions, segmentation, depth, image_tokens)
    ids = prompts[0]
    for (_, reply), prompt in zip(history, prompts[1:], strict=True):
        ids = [*ids, *reply, _end_of_turn(tokenizer), *prompt]
    return ids


def reply_ids(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: SpatialVocabulary,
    *,
    objects: int,
    codes: Sequence[int],
    text: str,
    depth_after_text: bool = False,
) -> list[int]:
    """Token ids of a reply, less its end of turn: `objects` times [SEG], a depth block if there are codes, the text."""
    block = vocabulary.block_of_codes(codes) if len(codes) else []
    words = plain_ids(tokenizer, text)
    return [vocabulary.seg_id] * objects + (words + block if depth_after_text else block + words)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of words, in which a control token's spelling stays what it is, letters.

    Raises ValueError where the tokenizer makes a control token of it all the same.
    """
    with _ENCODING:
        ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    forged = set(ids) & {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if forged:
        names = tokenizer.convert_ids_to_tokens(sorted(forged))
        raise ValueError(f"text: encoded with the control tokens {names}, expected plain words: take them out")
    return ids


def render(
    sample: Mapping[str, Any],
    entry: MixtureEntry,
    vocabulary: SpatialVocabulary,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: tuple[int, int],
    max_objects: int,
    image_tokens: int,
    depth_tokens: int,
    auto_share: float = 0.5,
    code_noise: float = 0.0,
    depth_after_text: bool = False,
    plain: bool = False,
) -> Dialogue:
    """The training dialogue of a samples row: turns, prompt and control line are drawn from `key`, (seed, position).

    `auto_share` of them leave a part to the model, as a request does unless it says otherwise (reconstruction).
    `code_noise` is the share of depth codes that are read as random ones, so that a model that has to write its own
    looks at the image and not at its last codes alone (reconstruction).
    `depth_after_text` puts the block behind the text, and `plain` counts all of a reply as text: plain next-token loss.
    A part is left out where the row has no data for it. A row without a turn that fits the entry is used for its depth.
    Where the entry wants boxes, expressions are answered by them, in words. Raises ValueError where a row has neither
    turn nor depth, for objects without a mask or above `max_objects`, and for another number of codes than
    `depth_tokens`.
    """
    rng = Random(f"{key[0]} {key[1]}")
    turns = _choose_turns(sample, entry, rng)
    codes = tuple(sample["codes"] or ()) if entry.depth else ()
    if codes and len(codes) != depth_tokens:
        raise ValueError(
            f"sample {sample['id']}: {len(codes)} depth codes, expected {depth_tokens}: tokenize its source again"
        )
    if not turns and not codes:
        raise ValueError(
            f"sample {sample['id']}: no turn of {len(sample['turns'])} fits mixture entry '{entry.source}' (kinds "
            f"{list(entry.kinds)}, max_turns {entry.max_turns}) and it has no depth codes: change the entry's kinds, "
            "or assemble the source with depth"
        )
    chosen = [sample["turns"][turn] for turn in turns]
    objects = _objects(sample, chosen[0], max_objects) if chosen and _is_segmented(sample, entry, chosen[0]) else ()
    said = [_in_boxes(sample, entry, turn, max_objects) or (turn["prompt"], turn["answer"]) for turn in chosen]
    questions, answers = zip(*said or [(rng.choice(DEPTH_PROMPTS), DEPTH_ANSWER)], strict=True)
    segmentation, depth = _control(bool(objects), auto_share, rng), _control(bool(codes), auto_share, rng)
    prompts = _prompts(tokenizer, questions, segmentation, depth, image_tokens)

    ids: list[int] = []
    kinds: list[LossKind] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        block = (len(objects), codes) if number == 0 else (0, ())
        reply = reply_ids(
            tokenizer, vocabulary, objects=block[0], codes=block[1], text=answer, depth_after_text=depth_after_text
        )
        reply.append(_end_of_turn(tokenizer))
        ids += prompt + reply
        kinds += [LossKind.IGNORE] * len(prompt) + [
            LossKind.TEXT if plain else _loss_kind(vocabulary, token_id) for token_id in reply
        ]
    return Dialogue(
        sample_id=sample["id"],
        input_ids=tuple(_noised(ids, vocabulary, code_noise, Random(f"{key[0]} {key[1]} code noise"))),
        target_ids=tuple(ids),
        loss_kinds=tuple(kinds),
        image_tokens=image_tokens,
        seg_positions=tuple(t for t, token_id in enumerate(ids) if token_id == vocabulary.seg_id),
        objects=objects,
        codes=codes,
        turns=turns,
    )


def _choose_turns(sample: Mapping[str, Any], entry: MixtureEntry, rng: Random) -> tuple[int, ...]:
    """Up to `max_turns` turns in random order; one that is answered by masks can only be the first."""
    turns = sample["turns"]
    fitting = [i for i, turn in enumerate(turns) if not entry.kinds or turn["kind"] in entry.kinds]
    fitting = [i for i in fitting if turns[i]["kind"] != "referring" or _is_answered(sample, entry, turns[i])]
    rng.shuffle(fitting)
    later = [i for i in fitting[1:] if not _is_segmented(sample, entry, turns[i])]
    return tuple([*fitting[:1], *later][: entry.max_turns])


def _is_segmented(sample: Mapping[str, Any], entry: MixtureEntry, turn: Mapping[str, Any]) -> bool:
    return entry.segmentation and _has_masks(sample, turn)


def _is_answered(sample: Mapping[str, Any], entry: MixtureEntry, turn: Mapping[str, Any]) -> bool:
    return (entry.segmentation or entry.boxes is not None) and _has_masks(sample, turn)


def _has_masks(sample: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    return turn["kind"] == "referring" and bool(turn["objects"]) and bool(sample["masks"])


def _in_boxes(
    sample: Mapping[str, Any], entry: MixtureEntry, turn: Mapping[str, Any], max_objects: int
) -> tuple[str, str] | None:
    """Question and answer of a turn whose masks are told as boxes; None where they are not."""
    if entry.boxes is None or not _has_masks(sample, turn):
        return None
    objects = _objects(sample, turn, max_objects)
    boxes = [box_within(rle_to_mask(sample["masks"][index]), entry.boxes) for index in objects]
    return f"Where is {turn['expression']}?", str([list(box) for box in boxes])


def _objects(sample: Mapping[str, Any], turn: Mapping[str, Any], max_objects: int) -> tuple[int, ...]:
    objects, masks = tuple(turn["objects"]), len(sample["masks"])
    if not all(0 <= index < masks for index in objects):
        raise ValueError(
            f"sample {sample['id']}: a turn names objects {objects}, the row has {masks} masks: assemble it again"
        )
    if len(objects) > max_objects:
        raise ValueError(
            f"sample {sample['id']}: a turn names {len(objects)} objects, expected at most {max_objects}: raise "
            "model.max_objects, or take such turns out of the source"
        )
    return objects


def _control(present: bool, auto_share: float, rng: Random) -> Part:
    if rng.random() < auto_share:
        return "auto"
    return "on" if present else "off"


def _noised(ids: Sequence[int], vocabulary: SpatialVocabulary, share: float, rng: Random) -> list[int]:
    codes = vocabulary.code_ids
    return [rng.choice(codes) if token_id in codes and rng.random() < share else token_id for token_id in ids]


def _loss_kind(vocabulary: SpatialVocabulary, token_id: int) -> LossKind:
    if token_id in vocabulary.code_ids:
        return LossKind.TOKEN
    return LossKind.MARKER if token_id in (vocabulary.depth_start_id, vocabulary.depth_end_id) else LossKind.TEXT


def _prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], segmentation: Part, depth: Part, image_tokens: int
) -> list[list[int]]:
    """What stands before each reply: from the start, then from behind the end of turn of the reply before."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"segmentation: {segmentation}, depth: {depth}"}]
    for number in range(len(questions)):
        text = {"type": "text", "text": _QUESTION}
        if number:
            messages.append({"role": "assistant", "content": _REPLY})
        messages.append({"role": "user", "content": [text] if number else [{"type": "image"}, text]})
    applied = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    slot = str(tokenizer.context_image_token)
    image = f"{tokenizer.start_image_token}{slot * image_tokens}{tokenizer.end_image_token}"
    parts = [part.split(_QUESTION) for part in applied.replace(slot, image).split(_REPLY)]
    fits = applied.count(slot) == 1 and [len(part) for part in parts] == [2] * len(questions)
    fits = fits and str(tokenizer.eos_token) in applied  # what ends the questions' turns ends a reply's
    prompts = [
        [*_control_ids(tokenizer, before), *plain_ids(tokenizer, question), *_control_ids(tokenizer, after)]
        for (before, after), question in (zip(parts, questions, strict=True) if fits else ())
    ]
    end = _end_of_turn(tokenizer)
    if not fits or any(ids[0] != end for ids in prompts[1:]):
        raise ValueError(
            f"chat template: {applied.count(slot)} places for one image, {len(parts)} prompts for {len(questions)} "
            f"questions, each turn to end with {tokenizer.eos_token!r}: expected a ChatML template as InternVL's"
        )
    return [prompts[0], *(ids[1:] for ids in prompts[1:])]


def _control_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a part of the template, in which a control token's spelling is that token."""
    with _ENCODING:
        return list(tokenizer.encode(text, add_special_tokens=False))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("tokenizer: it has no eos token, expected the one that ends a turn: set eos_token")
    return tokenizer.eos_token_id
