"""The teacher: the denoiser, and the encoders that make its conditioning of a rendered input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.checkpoint import check_schedule, load_denoiser, load_vae
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.config import NetworkConfig
from common.anytext2.denoiser import Denoiser
from common.anytext2.vae import VAE
from common.config import Config
from common.machine import resolve_device
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.glyph_embedding import GlyphEmbedding, font_lines, glyph_lines, load_glyph_embedding
from stage1_teacher.teacher.recognizer import Recognizer, load_recognizer
from stage1_teacher.teacher.text_encoder import TextEncoder, load_clip, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Teacher:
    """The frozen networks. No call changes anything: equal arguments give equal results, in any order."""

    network: NetworkConfig
    denoiser: Denoiser
    """UNet and WriteNet."""
    vae: VAE
    text_encoder: TextEncoder
    glyph_embedding: GlyphEmbedding
    recognizer: Recognizer
    negative_prompt: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, config: Config) -> Teacher:
        """Load the networks that a configuration names.

        Raises:
            UsageError: the configuration names no network or checkpoint.
            DataError: the checkpoint is missing, unreadable or of another network.
        """
        model, network = config.model, config.load_network()
        checkpoint = CheckpointFile(config.find_checkpoint())
        tokenizer_folder = config.resolve(model.clip, "model.clip")
        return cls.from_checkpoint(
            network,
            checkpoint,
            tokenizer_folder,
            negative_prompt=config.teacher.negative_prompt,
            device=resolve_device(model.device),
            dtype=getattr(torch, model.dtype),
        )

    @classmethod
    def from_checkpoint(
        cls,
        network: NetworkConfig,
        checkpoint: CheckpointFile,
        tokenizer_folder: Path,
        *,
        negative_prompt: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Teacher:
        """Load every part of a checkpoint; each of its keys is accounted for.

        Raises:
            DataError: the checkpoint or the tokenizer is unreadable or of another network.
        """
        check_schedule(checkpoint)
        tokenizer = load_tokenizer(tokenizer_folder, network)
        where = (dtype, device)
        clip = load_clip(network, checkpoint, *where)
        return cls(
            network=network,
            denoiser=load_denoiser(network, checkpoint, *where),
            vae=load_vae(network, checkpoint, *where),
            text_encoder=TextEncoder(clip, tokenizer, network.placeholder_token_id),
            glyph_embedding=load_glyph_embedding(network, checkpoint, *where),
            recognizer=load_recognizer(network, checkpoint, *where),
            negative_prompt=negative_prompt,
            device=torch.device(device),
            dtype=dtype,
        )

    @torch.no_grad()
    def encode(self, inputs: Sequence[RenderedInput]) -> list[Conditioning]:
        """Encode captions, lines and masked images of inputs of one size; float32, on the teacher's device."""
        image_contexts = self.text_encoder.encode_image_captions([item.caption for item in inputs])
        text_contexts = self.text_encoder.encode_text_captions(
            [item.text_caption for item in inputs], self._embed_lines(inputs)
        )
        masked_latents = self._encode_masked(inputs)
        return [
            Conditioning(
                image_context=image_context.float(),
                text_context=text_context.float(),
                glyphs=item.glyphs.to(self.device, torch.float32),
                positions=item.positions.to(self.device, torch.float32).sum(dim=0, keepdim=True),
                masked_latents=latents,
            )
            for item, image_context, text_context, latents in zip(
                inputs, image_contexts, text_contexts, masked_latents, strict=True
            )
        ]

    def _embed_lines(self, inputs: Sequence[RenderedInput]) -> list[Tensor]:
        """Return the embeddings of each input's lines, (n, c)."""
        counts = [len(item.glyph_lines) for item in inputs]
        if sum(counts) == 0:
            return [torch.empty(0, self.network.context_dim, device=self.device) for _ in inputs]
        # The lines' pixels stay on the CPU and in float32 until they are the recognizer's size.
        rendered = glyph_lines(torch.cat([item.glyph_lines for item in inputs]))  # (N, 3, 48, 320)
        masks = torch.cat([item.positions for item in inputs]).unsqueeze(1)  # (N, 1, H, W)
        fonts = [font_lines(item.font_hint, item.positions[:, None]) for item in inputs if len(item.positions)]
        colors = torch.cat([item.colors for item in inputs])  # (N, 3)
        features = self.recognizer.features(self._place(rendered))
        lines = self.glyph_embedding(
            features, self._place(masks), self._place(torch.cat(fonts)), self._place(colors)
        )
        return list(lines.split(counts))

    def _encode_masked(self, inputs: Sequence[RenderedInput]) -> list[Tensor]:
        """Encode masked images, (C, h, w) each; the blank one of generate mode only once."""
        rows: list[int] = []
        images: list[Tensor] = []
        blank: int | None = None
        for item in inputs:
            if item.mode == "generate" and blank is not None:
                rows.append(blank)
                continue
            if item.mode == "generate":
                blank = len(images)
            rows.append(len(images))
            images.append(item.masked_image)
        latents = self.vae.encode(self._place(torch.stack(images))).float()  # (D, C, h, w)
        return [latents[row] for row in rows]

    @torch.no_grad()
    def unconditional(self) -> Uncond:
        """Encode the negative prompt and an empty text caption; float32, on the teacher's device."""
        nothing = torch.empty(0, self.network.context_dim, device=self.device)
        image_context = self.text_encoder.encode_image_captions([self.negative_prompt])[0]
        text_context = self.text_encoder.encode_text_captions([""], [nothing])[0]
        return Uncond(image_context=image_context.float(), text_context=text_context.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, clipped to [-1, 1]."""
        return self.vae.decode(self._place(latents)).float().clamp(-1, 1)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)
