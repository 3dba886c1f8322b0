"""The peer of our decoding loop: transformers' own `generate` with the grammar as a logits processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from perceptio.decoding import ANYTHING
from perceptio.grammar import Allowed, ReplyGrammar, State
from perceptio.model import PerceptioForConditionalGeneration

KINDS = ("seg", "depth_start", "codes", "depth_end", "text", "end", "control")


def kinds_of(grammar: ReplyGrammar, vocabulary_size: int, eos_id: int) -> Tensor:
    """The kind of every token, as an index into KINDS: [V]."""
    vocabulary = grammar.vocabulary
    kind_V = torch.full((vocabulary_size,), KINDS.index("text"))
    kind_V[[*grammar.control_ids, *range(grammar.size or vocabulary_size, vocabulary_size)]] = KINDS.index("control")
    kind_V[eos_id] = KINDS.index("end")
    kind_V[vocabulary.seg_id] = KINDS.index("seg")
    kind_V[vocabulary.depth_start_id] = KINDS.index("depth_start")
    kind_V[vocabulary.depth_end_id] = KINDS.index("depth_end")
    kind_V[vocabulary.code_ids.start : vocabulary.code_ids.stop] = KINDS.index("codes")
    return kind_V


def open_tokens(allowed: Sequence[Allowed], kind_V: Tensor) -> Tensor:
    """Whether each token may come next, for each sequence: [B, V]."""
    rules = [[rule == ANYTHING or getattr(rule, name, False) for name in KINDS] for rule in allowed]
    allowed_BK = torch.tensor(rules, device=kind_V.device)
    return allowed_BK[:, kind_V]


class GrammarProcessor(LogitsProcessor):
    """Sets to -inf what the grammar of each sequence does not allow next; a finished sequence is left alone."""

    def __init__(self, grammars: Sequence[ReplyGrammar], prompt_length: int, eos_id: int, vocabulary_size: int) -> None:
        self.grammars, self.seen, self.eos_id = grammars, prompt_length, eos_id
        self.states: list[State | None] = [State() for _ in grammars]  # None once finished
        self.kind_V = kinds_of(grammars[0], vocabulary_size, eos_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        for ids in input_ids[:, self.seen :].T.tolist():
            self.states = [
                None if state is None or token_id == self.eos_id else grammar.advance(state, token_id)
                for grammar, state, token_id in zip(self.grammars, self.states, ids, strict=True)
            ]
        self.seen = input_ids.shape[1]
        rules = [
            ANYTHING if state is None else grammar.allowed(state)
            for grammar, state in zip(self.grammars, self.states, strict=True)
        ]
        return scores.masked_fill(~open_tokens(rules, self.kind_V), float("-inf"))


def generate(
    model: PerceptioForConditionalGeneration,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    pixel_values: Tensor | None,
    grammars: Sequence[ReplyGrammar],
    *,
    eos_id: int,
    new_tokens: int,
    use_cache: bool = True,
) -> list[list[int]]:
    """The ids of each reply before its end of turn, at most `new_tokens`."""
    prompt, size = input_ids_BT.shape[1], model.config.get_text_config().vocab_size
    anything: Any = model  # transformers types `generate` for its own classes only
    written_BT = anything.generate(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        **({} if pixel_values is None else {"pixel_values": pixel_values}),
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=new_tokens,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        logits_processor=LogitsProcessorList([GrammarProcessor(grammars, prompt, eos_id, size)]),
    )[:, prompt:]
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in written_BT.tolist()]
