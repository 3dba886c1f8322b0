"""Tokens a second over a whole reply, beside transformers' `generate` with a logits processor."""

from __future__ import annotations

from typing import Any

from tests.benchmarks._decoding import TOKENS, WORDS, beside


def run() -> dict[str, Any]:
    """The benchmark's result: [SEG], depth block and 32 words."""
    what = f"tokens/s of a whole reply with {WORDS} words, of transformers' generate"
    return beside("decoding_reply", what, "on", "on", WORDS, TOKENS + 3 + WORDS, bar=1.3)
