"""The model's configuration and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["none", "blocks", "selective"]
Precision = Literal["fp32", "bf16"]
"""Precision of matrix products and attention; the residual stream stays fp32."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a BEiT-3.

    Two variants are published. The paper's (arXiv 2208.10442): self-attention shared by both
    modalities, and a vision-language expert in the top layers. The released code's (torchscale):
    attention projections and norms per modality too, sub-LN, no vision-language expert.
    """

    layers: int = 12
    hidden: int = 768
    mlp: int = 3072
    heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    """Side in pixels of the square input that the position table is made for."""
    vocab_size: int = 64010
    max_text_length: int = 1022
    """Longest text in tokens, `<s>` and `</s>` included."""
    codebook_size: int = 8192
    """Number of visual words that the image head predicts."""
    attention: Literal["shared", "per_modality"] = "per_modality"
    """Whether attention's projections and the norms are shared by vision and language tokens."""
    multiway: bool = True
    """False: one feed-forward network for every token, the standard Transformer of the ablation."""
    vl_layers: int = 0
    """Number of top layers in which tokens of pairs go through a vision-language expert."""
    sub_ln: bool = True
    """Extra norms before the output projections (Magneto, arXiv 2210.06423)."""
    final_norm: bool = True
    """Norm of the encoder's output. The released ImageNet and VQA models have none: their heads
    bring their own."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm of the encoder. BEiT v2's tokenizers have 1e-6."""
    drop_path: float = 0.0
    """Stochastic depth of the last layer; grows linearly from 0 at the first."""
    checkpoint_activations: Checkpointing = "none"
    """Values that the backward pass recomputes instead of storing: `blocks`, all inside each block;
    `selective`, all but the results of matrix products and attention."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not divisible by heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if not 0 <= self.vl_layers <= self.layers:
            raise ValueError(f"vl_layers {self.vl_layers} is not within 0..layers {self.layers}")
        if self.vl_layers and not self.multiway:
            raise ValueError("vl_layers needs multiway=True: a standard Transformer has no experts")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


PRESETS: dict[str, ModelConfig] = {
    # For a CPU: a hundred steps on pictures of 48 pixels take seconds. The sample world's objects
    # are 13 to 24 pixels wide; patches of 8 pixels would be 2.25 times as many.
    "tiny": ModelConfig(
        layers=4,
        hidden=64,
        mlp=256,
        heads=4,
        patch_size=12,
        image_size=48,
        vocab_size=1024,
        max_text_length=126,
        codebook_size=512,
        attention="shared",
        vl_layers=1,
        sub_ln=False,
    ),
    # The released layout (microsoft/unilm beit3, microsoft/torchscale).
    "base": ModelConfig(),
    "large": ModelConfig(layers=24, hidden=1024, mlp=4096, heads=16),
    # The paper's 1.9B model (Table 2).
    "giant": ModelConfig(
        layers=40,
        hidden=1408,
        mlp=6144,
        heads=16,
        patch_size=14,
        vocab_size=64002,
        attention="shared",
        vl_layers=3,
        sub_ln=False,
    ),
}
