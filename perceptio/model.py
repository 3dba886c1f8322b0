"""The model: InternVL with spatial tokens, a SAM2 mask decoder fed by `[SEG]` states, and a frozen depth codec.

It is transformers' `InternVLForConditionalGeneration` with two parts more: LoRA, gradient checkpointing and device maps
that keep every weight in memory work on it as on InternVL, and so does `generate`, which knows no grammar. A model
folder holds config.json, safetensors, tokenizer, processor and `codebook/`, and nothing pickled. Importing this module
registers AutoConfig, AutoProcessor and AutoModelForImageTextToText.

Shape legend: B batch, T tokens, D hidden size, M masks, S SAM2's input side, P supervised positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration, PreTrainedConfig
from transformers.utils.hub import cached_file

from perceptio.config import PerceptioConfig
from perceptio.data.packing import Packing
from perceptio.depth.codebook import CONFIG_NAME, WEIGHTS_NAME
from perceptio.depth.codec import DepthCodec
from perceptio.processor import PerceptioProcessor
from perceptio.segmentation.mask_decoder import MaskPrediction, SegMaskDecoder
from perceptio.segmentation.sam2_image import Sam2Features, Sam2ImageConfig, Sam2ImageModel
from perceptio.vlm.backbone import MODEL_TYPE, count_lora, extend_vocabulary, load_backbone
from perceptio.vocabulary import require_fresh
from schemas.training import SpatialName

CODEBOOK_FOLDER = "codebook"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # finding files


class PerceptioForConditionalGeneration(InternVLForConditionalGeneration):  # type: ignore[no-untyped-call]
    """InternVL that writes spatial tokens first: `[SEG]` states become masks, depth codes a depth map."""

    config_class = PerceptioConfig
    config: PerceptioConfig
    # SAM2's: rounded, places would move
    _keep_in_fp32_modules_strict = {"positional_encoding_gaussian_matrix"}  # noqa: RUF012  # as transformers has it

    def __init__(self, config: PerceptioConfig) -> None:
        super().__init__(config)
        sam2 = Sam2ImageModel(Sam2ImageConfig.from_dict(config.sam2_config or {}))
        self.segmenter = SegMaskDecoder(sam2, config.get_text_config().hidden_size)
        self.codec: DepthCodec | None = None  # not a module: no cast, optimizer or checkpoint may touch it

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        pixel_values: Tensor,
        *,
        packed_to: int | None = None,
    ) -> Tensor:
        """Last-layer, post-norm hidden states [B, T, D] of whole sequences; nothing reaches the output head.

        With `packed_to`, right-padded samples are read behind one another, in rows of at most so many tokens. A batch
        of words alone has no tiles in `pixel_values`. Raises ValueError where the batch has another number of image
        tokens than its tiles make features, and for packed rows under another attention than torch's own; that each
        sample has its own image tokens is for `ask` and `collate` to see to.
        """
        if len(pixel_values) == 0:
            return self._words_alone(input_ids_BT, attention_mask_BT, pixel_values, packed_to=packed_to)
        if packed_to is None:
            output = self.model(
                input_ids=input_ids_BT, attention_mask=attention_mask_BT, pixel_values=pixel_values, use_cache=False
            )
            return torch.as_tensor(output.last_hidden_state)
        seen_by = self.config.get_text_config()._attn_implementation
        if seen_by != "sdpa":  # eager attention would add the packed rows' mask of booleans to its scores
            raise ValueError(f"attention is {seen_by!r}, expected 'sdpa' where samples are packed: load the model so")
        packing = Packing.of(attention_mask_BT.sum(1).tolist(), packed_to)
        positions_RL, sees_R1LL = packing.positions_and_sight(input_ids_BT.device)
        output = self.model(
            input_ids=packing.packed(input_ids_BT, int(self.config.get_text_config().pad_token_id or 0)),
            attention_mask=sees_R1LL,
            position_ids=positions_RL,
            pixel_values=pixel_values,
            use_cache=False,
        )
        return packing.unpacked(output.last_hidden_state, input_ids_BT.shape[1])

    def _words_alone(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, pixel_values: Tensor, *, packed_to: int | None
    ) -> Tensor:
        """`hidden_states` of samples without any image: one more sample, an empty tile, is read and changes nothing.

        So this rank runs the same modules in the same order as ranks that have images; under ZeRO-3 they would wait for
        each other for ever.
        """
        samples, tokens = input_ids_BT.shape
        slots = int(self.config.image_seq_length)
        room = (0, max(slots - tokens, 0), 0, 1)  # at the right, and a row below
        ids_BT = nn.functional.pad(input_ids_BT, room, value=int(self.config.get_text_config().pad_token_id or 0))
        mask_BT = nn.functional.pad(attention_mask_BT, room)
        ids_BT[samples, :slots], mask_BT[samples, :slots] = int(self.config.image_token_id), 1
        blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        hidden_BTD = self.hidden_states(ids_BT, mask_BT, blank, packed_to=packed_to)
        return hidden_BTD[:samples, :tokens] + 0 * hidden_BTD[samples].sum()

    def image_features(self, pixels_B3SS: Tensor) -> Sam2Features:
        """SAM2's features of preprocessed images; the trunk is frozen, its two high-res convolutions are not."""
        return self.segmenter.sam2.encode(pixels_B3SS)

    def masks(self, hidden_MD: Tensor, features: Sam2Features, image_index_M: Tensor) -> MaskPrediction:
        """Mask logits [M, S/4, S/4] and predicted IoU [M] of the hidden states where `[SEG]` is the input (lineage)."""
        prediction: MaskPrediction = self.segmenter(hidden_MD, features, image_index_M)
        return prediction

    def attach_codec(self, codec: DepthCodec) -> None:
        """Gives the model its depth codec; raises ValueError where the digest is not the one it was trained with."""
        if codec.digest != self.config.codebook_digest:
            raise ValueError(
                f"codebook digest is {codec.digest[:16]}, the model was made with {self.config.codebook_digest[:16]}:"
                " use the codebook that its codes come from, or train anew"
            )
        self.codec = codec

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config.json, safetensors and `codebook/`; the processor is saved by its own `save_pretrained`.

        Raises ValueError without a codec, and with LoRA layers, whose names no plain model would find again.
        """
        if self.codec is None:
            raise ValueError("the model has no codec: attach_codec() before saving, so that the folder is whole")
        if layers := count_lora(self):
            raise ValueError(f"the model has {layers} LoRA layers, expected none in a folder: merge_lora() first")
        super().save_pretrained(save_directory, **kwargs)
        self.codec.codebook.save_pretrained(Path(save_directory) / CODEBOOK_FOLDER)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        sam2: str | Path | None = None,
        codebook: str | Path | None = None,
        max_objects: int | None = None,
        **kwargs: Any,
    ) -> PerceptioForConditionalGeneration:
        """The model of a Perceptio folder or hub id, with its codec; keywords are transformers' own.

        An InternVL becomes an untrained Perceptio with the folders `sam2` and `codebook` and at most `max_objects`
        masks a reply, 5 by default (see `from_parts`; its processor is `PerceptioProcessor.from_pretrained(INTERNVL,
        codebook=...)`). Raises ValueError for any other model, for an InternVL without these two, where weights are
        missing or too many, and where the codebook is not the one that the model was trained with.
        """
        source = str(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if (sam2 is None) != (codebook is None):
            raise ValueError(f"{source}: got one of sam2= and codebook=, expected both (InternVL) or none (Perceptio)")
        if sam2 is not None and codebook is not None:
            dtype = kwargs.pop("dtype", torch.float32)
            if others := sorted(kwargs.keys() - hub.keys()) or args:
                raise ValueError(f"{source}: {others} are for a Perceptio folder, got an InternVL's")
            return cls.from_parts(
                source, sam2, codebook, max_objects=5 if max_objects is None else max_objects, dtype=dtype, **hub
            )[0]
        found = PreTrainedConfig.get_config_dict(source, **hub)[0].get("model_type")
        if found != PerceptioConfig.model_type:
            hint = ": pass sam2= and codebook= too" if found == MODEL_TYPE else ""
            raise ValueError(f"{source}: config.json has model_type {found!r}, expected 'perceptio'{hint}")
        if max_objects is not None:
            raise ValueError(f"{source}: max_objects is {max_objects}, but a Perceptio's is fixed in its config.json")
        if kwargs.pop("output_loading_info", False):
            raise ValueError(f"{source}: output_loading_info is true, expected false: weights are checked here")
        loaded_with: Any = super().from_pretrained(
            source, *args, **kwargs | {"output_loading_info": True, "use_safetensors": True}
        )
        model: PerceptioForConditionalGeneration
        model, loaded = loaded_with
        if wrong := sorted(loaded["missing_keys"] | loaded["unexpected_keys"]):
            raise ValueError(
                f"{source}: {len(wrong)} weights are missing or too many, the first {wrong[0]}: save it anew"
            )
        hub["subfolder"] = str(Path(hub.get("subfolder", "")) / CODEBOOK_FOLDER)
        files = [cached_file(source, name, **hub) for name in (CONFIG_NAME, WEIGHTS_NAME)]
        model.attach_codec(DepthCodec.from_pretrained(Path(str(files[0])).parent).to(model.device))
        return model

    @classmethod
    def from_parts(
        cls,
        base: str | Path,
        sam2: str | Path,
        codebook: str | Path,
        *,
        max_objects: int,
        depth_after_text: bool = False,
        starts_as: Mapping[SpatialName, str] | None = None,
        embedding_noise: float = 0.1,
        prompts_start_as_clicks: bool = False,
        dtype: torch.dtype | str = torch.float32,
        **hub: Any,
    ) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
        """An untrained Perceptio model and its processor, from an InternVL, a SAM2 image model and a codebook.

        `base` is a folder or hub id in transformers' layout (`hub` says how to find it: revision, token, ...); the
        tokenizer and embeddings are extended here (see `extend_vocabulary`), the mask projector starts at random: seed
        torch before. Every part trains but SAM2's frozen ones until `add_lora(model)` and `set_trainable(model)` leave
        those that the lineage trains. Raises ValueError for a base that has spatial tokens already.
        """
        backbone, processor = load_backbone(str(base), dtype=dtype, **hub)
        require_fresh(processor.tokenizer, str(base))
        codec = DepthCodec.from_pretrained(codebook)
        segmenter = Sam2ImageModel.from_pretrained(sam2)
        vocabulary = extend_vocabulary(
            backbone, processor.tokenizer, codec.codes, starts_as=starts_as, noise=embedding_noise
        )
        fields = backbone.config.to_dict() | {
            "sam2_config": segmenter.config.to_dict(),
            "codebook_digest": codec.digest,
            "depth_codes": codec.codes,
            "depth_tokens": codec.tokens,
            "seg_token_id": vocabulary.seg_id,
            "depth_start_token_id": vocabulary.depth_start_id,
            "depth_end_token_id": vocabulary.depth_end_id,
            "first_code_token_id": vocabulary.first_code_id,
            "max_objects": max_objects,
            "depth_after_text": depth_after_text,
        }
        model = cls(_config(fields))
        for weight in model.parameters():  # and no buffer: rotary frequencies stay in fp32
            weight.data = weight.data.to(backbone.dtype)
        missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
        lost = [name for name in missing if not name.startswith("segmenter.")]
        if lost or unexpected:
            raise ValueError(f"base '{base}': weights missing {lost[:3]}, unexpected {list(unexpected)[:3]}")
        model.segmenter.sam2.load_state_dict(segmenter.state_dict())
        if prompts_start_as_clicks:
            model.segmenter.start_as_clicks()
        model.generation_config = backbone.generation_config
        model.attach_codec(codec)
        return model, PerceptioProcessor.of(processor, model.config)

    @classmethod
    def of_shape(
        cls, base: str | Path, sam2: str | Path, *, codes: int, **hub: Any
    ) -> PerceptioForConditionalGeneration:
        """The model that `from_parts` would make, on torch's meta device: every shape, and no weight in memory.

        Only configurations are read. It has a row more for each spatial token even where the base has spare ones.
        """
        fields, _ = PreTrainedConfig.get_config_dict(str(base), **hub)
        fields["text_config"] = fields["text_config"] | {"vocab_size": fields["text_config"]["vocab_size"] + codes + 3}
        fields["sam2_config"] = json.loads((Path(sam2) / "config.json").read_text(encoding="utf-8"))
        with init_empty_weights(include_buffers=False):
            model = cls(_config(fields))
        model.tie_weights()
        return model


AutoModelForImageTextToText.register(PerceptioConfig, PerceptioForConditionalGeneration)


def _config(fields: Mapping[str, Any]) -> PerceptioConfig:
    """Of a base's configuration, with ours in it."""
    others = ("model_type", "architectures", "transformers_version")
    return PerceptioConfig(**{name: value for name, value in fields.items() if name not in others})
