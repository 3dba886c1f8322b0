"""Our decoding loop beside transformers' `generate` with the same grammar as a logits processor, on random weights.

The model has the vocabulary and the width of InternVL2.5-1B and 4 of its layers, in fp32; 8 prompts of 64 tokens, no
image. A side's seconds are those of a whole reply less those of a reply of one token, so that reading the prompt is out
of them; both sides take turns, and the middle of REPEATS ratios counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from perceptio.config import PerceptioConfig
from perceptio.decoding import decode
from perceptio.grammar import Part, ReplyGrammar
from perceptio.model import PerceptioForConditionalGeneration
from tests.constrained import generate

VOCABULARY, WIDTH, LAYERS, BATCH, PROMPT, CODES, TOKENS, WORDS = 151_674, 896, 4, 8, 64, 128, 100, 32
EOS = 0
REPEATS, THREADS = 3, 2
NEAR = 1e-4  # logits this close may change places

Ids = list[list[int]]


@cache
def model() -> PerceptioForConditionalGeneration:
    """Random weights; the output head is not tied, as in the 1B."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    first = VOCABULARY - CODES - 3
    text = {"model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    text |= {"intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 32_768, "tie_word_embeddings": False, "initializer_range": 0.05}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PerceptioConfig(
        vision_config=vision | {"image_size": [32, 32], "patch_size": [8, 8]},
        text_config=text,
        tie_word_embeddings=False,
        sam2_config={"image_size": 64, "embed_dim": 16},
        depth_codes=CODES,
        depth_tokens=TOKENS,
        seg_token_id=first,
        depth_start_token_id=first + 1,
        first_code_token_id=first + 2,
        depth_end_token_id=first + 2 + CODES,
        max_objects=1,
    )
    found = PerceptioForConditionalGeneration(config)
    found.train(False)
    return found


def prompt() -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of words."""
    ids_BT = torch.randint(1, VOCABULARY - CODES - 3, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    return ids_BT, torch.ones_like(ids_BT)


def grammars(segmentation: Part, depth: Part) -> list[ReplyGrammar]:
    """One for each prompt."""
    config = model().config
    return [ReplyGrammar(config.vocabulary, TOKENS, config.max_objects, segmentation, depth) for _ in range(BATCH)]


def ours(segmentation: Part, depth: Part, words: int, *, use_grammar: bool = True) -> Ids:
    """Replies by our loop."""
    written = decode(
        model(),
        *prompt(),
        None,
        grammars(segmentation, depth),
        eos_id=EOS,
        max_new_tokens=words,
        use_grammar=use_grammar,
    )
    return [reply.ids for reply in written]


def theirs(segmentation: Part, depth: Part, new_tokens: int) -> Ids:
    """Replies by transformers' `generate`."""
    return generate(model(), *prompt(), None, grammars(segmentation, depth), eos_id=EOS, new_tokens=new_tokens)


def seconds(whole: Callable[[], Ids], one: Callable[[], Ids]) -> tuple[float, Ids]:
    """Seconds of a whole reply less those of its first token, and the reply."""
    began = time.perf_counter()
    one()
    between = time.perf_counter()
    found = whole()
    return (time.perf_counter() - between) - (between - began), found


def differing(a: Ids, b: Ids) -> int:
    """How many replies differ where no two logits were nearly alike. Raises AssertionError where one does."""
    found = 0
    for number, (x, y) in enumerate(zip(a, b, strict=True)):
        if x == y:
            continue
        found += 1
        place = next((i for i, (m, n) in enumerate(zip(x, y, strict=False)) if m != n), None)
        assert place is not None, f"reply {number}: {len(x)} tokens beside {len(y)}"
        ids_BT = torch.cat([prompt()[0][number : number + 1], torch.tensor([x[:place]], dtype=torch.long)], dim=1)
        with torch.inference_mode():
            logits_V = model()(input_ids=ids_BT, logits_to_keep=1).logits[0, -1]
        apart = abs(float(logits_V[x[place]] - logits_V[y[place]]))
        assert apart < NEAR, f"reply {number}, token {place}: logits {apart} apart"
    return found


def beside(
    name: str, what: str, segmentation: Part, depth: Part, words: int, tokens: int, bar: float
) -> dict[str, Any]:
    """The result of a benchmark: their seconds over ours for replies of `tokens` tokens, the same on both sides."""
    for warm_up in (ours, theirs):
        warm_up("off", "off", 1)
    ratios, rows = [], []
    for _ in range(REPEATS):
        own, mine = seconds(lambda: ours(segmentation, depth, words), lambda: ours("off", "off", 1))
        peer, other = seconds(lambda: theirs(segmentation, depth, tokens), lambda: theirs("off", "off", 1))
        assert {len(ids) for ids in (*mine, *other)} == {tokens}
        ratios.append(peer / own)
        rate = BATCH * (tokens - 1)
        rows.append(
            {"ours_tokens_per_s": rate / own, "peer_tokens_per_s": rate / peer, "differ": differing(mine, other)}
        )
    value = statistics.median(ratios)
    fixed = {"name": name, "what": what, "unit": "x", "bar": bar, "higher_is_better": True}
    return fixed | {"value": value, "holds": value >= bar, "rows": rows}
