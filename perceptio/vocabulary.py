"""The spatial tokens and their ids: the one place where a spatial token is spelled.

    [SEG]  <|depth_start|>  <|depth_0|> ... <|depth_{K-1}|>  <|depth_end|>

K is the codebook's number of codes. The tokens are added to a tokenizer once, as special tokens, in this order, so that
the K code ids are one contiguous run and `decode(skip_special_tokens=True)` leaves plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEG = "[SEG]"
DEPTH_START = "<|depth_start|>"
DEPTH_END = "<|depth_end|>"
_CODE = "<|depth_{}|>"


def spatial_tokens(codes: int) -> list[str]:
    """Every spatial token for a codebook of `codes` codes, in the order of their ids (paper; spelling: reconstruction).

    Raises ValueError if `codes` is less than 1.
    """
    if codes < 1:
        raise ValueError(f"codes: got {codes}, expected at least 1: pass the codebook's number of codes")
    return [SEG, DEPTH_START, *(_CODE.format(code) for code in range(codes)), DEPTH_END]


@dataclass(frozen=True)
class SpatialVocabulary:
    """The ids of the spatial tokens in one tokenizer; the code ids run from `first_code_id` without a gap."""

    seg_id: int
    depth_start_id: int
    depth_end_id: int
    first_code_id: int
    codes: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, codes: int) -> SpatialVocabulary:
        """The ids that an already extended tokenizer gives to the spatial tokens.

        Raises ValueError if the tokenizer has none of them, has them for another number of codes, or in another order.
        """
        present = tokenizer.get_added_vocab()
        wanted = spatial_tokens(codes)
        missing = [token for token in wanted if token not in present]
        if missing:
            raise ValueError(
                f"tokenizer: {len(missing)} of {len(wanted)} spatial tokens for {codes} codes are missing, the first "
                f"{missing[0]!r} (it has {_codes_in(tokenizer)} codes): call extend_tokenizer, or use the tokenizer "
                "saved with this codebook"
            )
        if _codes_in(tokenizer) != codes:
            raise ValueError(
                f"tokenizer: extended with {_codes_in(tokenizer)} depth codes, expected {codes}: use the tokenizer "
                "saved with this codebook"
            )
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if plain := [token for token in wanted if token not in special]:
            raise ValueError(
                f"tokenizer: {len(plain)} of {len(wanted)} spatial tokens are not special, the first {plain[0]!r}, so"
                " that words could spell them: extend a fresh tokenizer with extend_tokenizer"
            )
        ids = [present[_CODE.format(code)] for code in range(codes)]
        if ids != list(range(ids[0], ids[0] + codes)):
            raise ValueError(
                f"tokenizer: depth code ids are not one run upward from {ids[0]}: extend a fresh tokenizer with "
                "extend_tokenizer"
            )
        return cls(present[SEG], present[DEPTH_START], present[DEPTH_END], ids[0], codes)

    @property
    def code_ids(self) -> range:
        """The ids of code 0 to code K-1."""
        return range(self.first_code_id, self.first_code_id + self.codes)

    @property
    def all_ids(self) -> frozenset[int]:
        """The ids of all spatial tokens: markers and codes."""
        return frozenset((self.seg_id, self.depth_start_id, self.depth_end_id, *self.code_ids))

    def ids_of_codes(self, codes: Sequence[int]) -> list[int]:
        """Token ids of depth codes; raises ValueError for a code outside [0, K)."""
        for code in codes:
            if not 0 <= code < self.codes:
                raise ValueError(f"depth code: got {code}, expected 0 to {self.codes - 1}: is this another codebook's?")
        return [self.first_code_id + int(code) for code in codes]

    def codes_of_ids(self, ids: Sequence[int]) -> list[int]:
        """Depth codes of token ids; raises ValueError for an id that is not a depth code's."""
        for token_id in ids:
            if token_id not in self.code_ids:
                raise ValueError(
                    f"token id: got {token_id}, expected a depth code's, "
                    f"{self.code_ids.start} to {self.code_ids.stop - 1}"
                )
        return [int(token_id) - self.first_code_id for token_id in ids]

    def block_of_codes(self, codes: Sequence[int]) -> list[int]:
        """Token ids of a whole depth block: start marker, codes, end marker."""
        return [self.depth_start_id, *self.ids_of_codes(codes), self.depth_end_id]


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, codes: int) -> SpatialVocabulary:
    """The spatial ids after adding the tokens to `tokenizer`, in place; a second call changes nothing.

    Raises ValueError if the tokenizer was extended for another number of codes, or has some of the tokens but not all.
    """
    wanted = spatial_tokens(codes)
    found = _codes_in(tokenizer)
    if found not in (0, codes):
        raise ValueError(
            f"tokenizer: already extended with {found} depth codes, got {codes}: start from the base model's tokenizer"
        )
    known = tokenizer.get_vocab()
    present = [token for token in wanted if token in known]
    if present and len(present) < len(wanted):
        raise ValueError(
            f"tokenizer: it has {present[:3]} of its own, {len(present)} of the {len(wanted)} spatial tokens for"
            f" {codes} codes, expected none or all: start from a base that has none"
        )
    if not present:
        tokenizer.add_tokens(wanted, special_tokens=True)
    return SpatialVocabulary.of(tokenizer, codes)


def require_fresh(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raises ValueError where a base's tokenizer has spatial tokens already, whatever their number of codes."""
    known = {token for token in tokenizer.get_vocab() if token in (SEG, DEPTH_START, DEPTH_END)}
    if known or _codes_in(tokenizer):
        raise ValueError(
            f"{source}: its tokenizer has {sorted(known)} and {_codes_in(tokenizer)} depth codes already, expected"
            " none: start from an InternVL as it was before it was extended"
        )


def _codes_in(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of depth code tokens that the tokenizer already has."""
    prefix, suffix = _CODE.split("{}")
    return sum(
        token.startswith(prefix) and token.endswith(suffix) and token[len(prefix) : -len(suffix)].isdecimal()
        for token in tokenizer.get_added_vocab()
    )
