"""Greedy decoding of a batch under the grammar, in one pass over a key-value cache.

What the grammar leaves open decides what is computed: inside the depth block the K code rows of the output head, behind
a whole block nothing at all, elsewhere the whole head. A `[SEG]` state is taken where `[SEG]` is the input (lineage).

Shape legend: B sequences, T prompt tokens (left-padded), D hidden size, V vocabulary, R rows of the output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from perceptio.grammar import Allowed, Phase, ReplyGrammar, State
from perceptio.model import PerceptioForConditionalGeneration
from perceptio.vocabulary import SpatialVocabulary

ANYTHING = Allowed(True, True, True, True, True, True)


@dataclass
class Written:
    """What was written for one prompt; a mutable record while it grows."""

    grammar: ReplyGrammar
    ids: list[int] = field(default_factory=list)  # the end of turn is not among them
    seg_states: list[Tensor] = field(default_factory=list)  # [D] for each [SEG] that was read again
    finish: Literal["", "stop", "length"] = ""
    state: State = field(default_factory=State)
    words: int = 0
    cut: bool = False  # words were cut off, though a block came behind them


@torch.inference_mode()
def decode(
    model: PerceptioForConditionalGeneration,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    pixel_values: Tensor | None,
    grammars: Sequence[ReplyGrammar],
    *,
    eos_id: int,
    max_new_tokens: int,
    use_grammar: bool = True,
    forced_codes: Mapping[int, Sequence[int]] | None = None,
) -> list[Written]:
    """The reply to each left-padded prompt.

    `max_new_tokens` bounds the text; the spatial block comes on top. Without the grammar the model writes what it
    likes, as long as with it at most. `forced_codes` holds depth codes for some of the prompts by number, which their
    blocks get whatever the model would write. Raises ValueError for a `max_new_tokens` below 1, and for forced codes
    that are not a block of this vocabulary or that the request or a missing grammar forbids.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    replies = [Written(grammar) for grammar in grammars]
    forced = {b: _block(grammars[b], codes, use_grammar) for b, codes in (forced_codes or {}).items()}
    head = _Head(model.lm_head.weight, model.config.vocabulary, eos_id, grammars[0])
    cache = DynamicCache(config=model.config.get_text_config())
    mask_BT = attention_mask_BT
    places_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    ids_BT, pixels = input_ids_BT, {"pixel_values": pixel_values}
    while True:
        hidden_BD = (
            model.model(
                input_ids=ids_BT, attention_mask=mask_BT, position_ids=places_BT, past_key_values=cache, **pixels
            )
            .last_hidden_state[:, -1]
            .to(head.weight_VD.device)
        )  # a device map may put the head elsewhere
        for reply, hidden_D in zip(replies, hidden_BD, strict=True):
            if not reply.finish and reply.ids and reply.ids[-1] == head.vocabulary.seg_id:
                reply.seg_states.append(hidden_D)
        given = {
            b: forced[b][r.state.codes] for b, r in enumerate(replies) if b in forced and r.state.phase is Phase.CODES
        }
        open_ = [b for b, reply in enumerate(replies) if not reply.finish and b not in given]
        allowed = [replies[b].grammar.allowed(replies[b].state) if use_grammar else ANYTHING for b in open_]
        chosen = head.best(hidden_BD[open_] if len(open_) < len(replies) else hidden_BD, allowed)
        for b, token_id in (*zip(open_, chosen, strict=True), *given.items()):
            _take(replies[b], token_id, eos_id, max_new_tokens, use_grammar)
        if all(reply.finish for reply in replies):
            return replies
        ids_BT = torch.tensor([[reply.ids[-1] if reply.ids else eos_id] for reply in replies], device=mask_BT.device)
        mask_BT = F.pad(mask_BT, (0, 1), value=1)
        places_BT, pixels = places_BT[:, -1:] + 1, {}


def _take(reply: Written, token_id: int, eos_id: int, max_new_tokens: int, use_grammar: bool) -> None:
    """Puts the next token behind a reply, and ends it where it is the end of turn or the last that fits."""
    if token_id == eos_id:
        reply.finish = "length" if reply.cut else "stop"
        return
    reply.ids.append(token_id)
    grammar = reply.grammar
    if not use_grammar:
        reply.finish = "length" if len(reply.ids) >= max_new_tokens + grammar.longest_block else ""
        return
    reply.state = grammar.advance(reply.state, token_id)
    reply.words += grammar.kind(token_id) == "text"
    if reply.words >= max_new_tokens and reply.state.phase is Phase.TEXT:
        last = grammar.without_more_words(reply.state)
        reply.finish, reply.state = ("length", reply.state) if last is None else ("", last)
        reply.cut = True


def _block(grammar: ReplyGrammar, codes: Sequence[int], use_grammar: bool) -> list[int]:
    """The token ids of forced codes."""
    if len(codes) != grammar.tokens or grammar.depth != "on" or not use_grammar:
        raise ValueError(
            f"forced codes: {len(codes)} with depth '{grammar.depth}' and the grammar {'on' if use_grammar else 'off'},"
            f" expected {grammar.tokens} with depth 'on' and the grammar on"
        )
    return grammar.vocabulary.ids_of_codes(codes)


class _Head:
    """The output head, of which only the rows are computed that the grammar leaves open."""

    def __init__(self, weight_VD: Tensor, vocabulary: SpatialVocabulary, eos_id: int, grammar: ReplyGrammar) -> None:
        self.weight_VD, self.vocabulary, self.eos_id = weight_VD, vocabulary, eos_id
        rows = len(weight_VD)  # padded ones have no token
        self.never = [*grammar.control_ids, *range(rows if grammar.size is None else grammar.size, rows)]
        self._shut: dict[Allowed, Tensor] = {}

    def best(self, hidden_BD: Tensor, allowed: Sequence[Allowed]) -> list[int]:
        """The most likely of the tokens that may come next, for each state."""
        chosen = [-1] * len(allowed)
        for rule in dict.fromkeys(allowed):
            places = [b for b, other in enumerate(allowed) if other == rule]
            hidden_ND = hidden_BD if len(places) == len(allowed) else hidden_BD[places]
            for b, token_id in zip(places, self._best(hidden_ND, rule), strict=True):
                chosen[b] = token_id
        return chosen

    def _best(self, hidden_ND: Tensor, rule: Allowed) -> list[int]:
        if rule.text:
            logits_NV = F.linear(hidden_ND, self.weight_VD)
            logits_NV[:, self._ids(rule, shut=True)] = float("-inf")
            return [int(token_id) for token_id in logits_NV.argmax(-1).tolist()]
        if rule == Allowed(codes=True):  # one run of rows: a view, not a copy
            codes = self.vocabulary.code_ids
            logits_NR = F.linear(hidden_ND, self.weight_VD[codes.start : codes.stop])
            return [codes[code] for code in logits_NR.argmax(-1).tolist()]
        ids_R = self._ids(rule, shut=False)
        if len(ids_R) == 1:
            return [int(ids_R)] * len(hidden_ND)
        return [int(i) for i in ids_R[F.linear(hidden_ND, self.weight_VD[ids_R]).argmax(-1)].tolist()]

    def _ids(self, rule: Allowed, *, shut: bool) -> Tensor:
        """Ids of the tokens beside words that a rule with words forbids, or of those that one without words allows."""
        if rule not in self._shut:
            vocabulary = self.vocabulary
            groups = (
                (rule.seg, [vocabulary.seg_id]),
                (rule.depth_start, [vocabulary.depth_start_id]),
                (rule.codes, vocabulary.code_ids),
                (rule.depth_end, [vocabulary.depth_end_id]),
                (rule.end, [self.eos_id]),
            )
            ids = [token_id for free, group in groups if free != shut for token_id in group]
            ids += self.never if shut and rule != ANYTHING else []
            self._shut[rule] = torch.tensor(ids, dtype=torch.long, device=self.weight_VD.device)
        return self._shut[rule]
