"""The configuration of a Perceptio model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, InternVLConfig

from perceptio.vocabulary import SpatialVocabulary


@strict
class PerceptioConfig(InternVLConfig):  # type: ignore[no-untyped-call]  # transformers' own hook
    """InternVL's configuration, with the spatial vocabulary, SAM2's shape and the codebook's digest."""

    model_type = "perceptio"

    sam2_config: dict[str, Any] | None = None  # of Sam2ImageConfig
    codebook_digest: str = ""
    depth_codes: int = 0  # K
    depth_tokens: int = 0  # N
    seg_token_id: int = -1
    depth_start_token_id: int = -1
    depth_end_token_id: int = -1
    first_code_token_id: int = -1
    max_objects: int = 5
    depth_after_text: bool = False  # the depth block stands behind the text; for the study of the order

    @property
    def vocabulary(self) -> SpatialVocabulary:
        """The ids of the spatial tokens."""
        return SpatialVocabulary(
            self.seg_token_id,
            self.depth_start_token_id,
            self.depth_end_token_id,
            self.first_code_token_id,
            self.depth_codes,
        )


AutoConfig.register("perceptio", PerceptioConfig)
