"""Tokens a second inside the depth block, beside transformers' `generate` with a logits processor."""

from __future__ import annotations

from typing import Any

from tests.benchmarks._decoding import TOKENS, beside


def run() -> dict[str, Any]:
    """The benchmark's result: a depth block and one word, of which all but two tokens stand inside the block."""
    what = "tokens/s in the depth block, of transformers' generate"
    return beside("decoding_block", what, "off", "on", 1, TOKENS + 3, bar=2.0)
