"""Reads the authors' VQ-KD tokenizers (microsoft/unilm beit2, `vqkd_encoder_base_decoder_*.pth`).

    python -m beit3.vqkd_released vqkd_encoder_base_decoder_3x768x12_clip.pth folder

makes a tokenizer folder (`beit3.vqkd.save`) from a checkpoint. Pickles are only ever read with
`weights_only=True`.

Differences: their queries and values have separate biases, their keys none; and their network takes
[0, 1] and scales it to [-1, 1] itself, the range to which `beit3.vqkd.VQKD` scales bytes. Their
code multiplies by 255 only if a batch's largest value is at most 1, so it misreads an all but black
batch of bytes; this project's takes bytes only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from beit3 import vqkd
from beit3.model import interpolate_positions
from beit3.released import HEAD_WIDTH, read_arguments, read_tensors
from beit3.vqkd import VQKD, VQKDConfig

_DROPPED = ("loss", "teacher", "scaling")  # as their own loader does
_CODES = "quantize.embedding.weight"
_STARTED = "quantize.embedding.initted"
_USAGE = "quantize.cluster_size"
_PATCHES = "encoder.patch_embed.proj.weight"
_POSITIONS = "encoder.pos_embed"
_FC1 = "encoder.blocks.0.mlp.fc1.weight"
_TARGET = "decode_task_layer.2.weight"
_BLOCK = {
    "norm1.both": "norm1",
    "attention.out.both": "attn.proj",
    "norm2.both": "norm2",
    "experts.vision_expert.fc1": "mlp.fc1",
    "experts.vision_expert.fc2": "mlp.fc2",
}


def load_released(
    path: Path, *, image_size: int | None = None, heads: int | None = None
) -> tuple[VQKDConfig, dict[str, Tensor]]:
    """A checkpoint's configuration, and its tensors as `VQKD` loads them.

    Args:
        path: `.safetensors`, or else a pickle of tensors, bare or under "model" or "state_dict".
        image_size: Side of the pictures that both position tables are interpolated for.
        heads: Attention heads, if they are not 64 wide.

    Raises:
        ValueError: the file holds anything but tensors, or another model's; each key that is
            missing, unexpected or of the wrong shape is named.
    """
    try:
        tensors = read_tensors(path, ("model", "state_dict"))
        return from_released(tensors, image_size=image_size, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_released(
    tensors: Mapping[str, Tensor], *, image_size: int | None = None, heads: int | None = None
) -> tuple[VQKDConfig, dict[str, Tensor]]:
    """`load_released` for tensors in memory.

    Raises:
        ValueError: as `load_released`.
    """
    theirs = {key: value for key, value in tensors.items() if not key.startswith(_DROPPED)}
    config = _infer(theirs, heads)
    _check(theirs, config)
    ours = {key: theirs[name] for key, name in _pairs(config).items()}
    sides = (
        ("encoder", "embedding.", config.encoder_layers),
        ("decoder", "decoder_", config.decoder_layers),
    )
    for side, prefix, layers in sides:
        ours[f"{prefix}cls_token"] = theirs[f"{side}.cls_token"].reshape(-1)
        ours[f"{prefix}positions"] = theirs[f"{side}.pos_embed"][0]
        for i in range(layers):
            block, attention = f"{side}.blocks.{i}.attention.qkv.both", f"{side}.blocks.{i}.attn"
            query, value = theirs[f"{attention}.q_bias"], theirs[f"{attention}.v_bias"]
            ours[f"{block}.weight"] = theirs[f"{attention}.qkv.weight"]
            # A bias of the keys shifts all scores of a query equally: zero is as good as any.
            ours[f"{block}.bias"] = torch.cat([query, torch.zeros_like(query), value])
    ours["from_code.weight"] = theirs["decoder.patch_embed.proj.weight"][:, :, 0, 0]
    ours["codebook.ready"] = torch.tensor(True)
    floats = {k: v.float() if v.is_floating_point() else v for k, v in ours.items()}
    if image_size is not None and image_size != config.image_size:
        config = replace(config, image_size=image_size)
        grid = image_size // config.patch_size
        if image_size % config.patch_size:
            raise ValueError(
                f"image_size {image_size} is not divisible by the patch {config.patch_size}"
            )
        for table in ("embedding.positions", "decoder_positions"):
            floats[table] = interpolate_positions(floats[table], grid, grid)
    return config, {key: value.contiguous() for key, value in floats.items()}


def _infer(tensors: Mapping[str, Tensor], heads: int | None) -> VQKDConfig:
    """The configuration, inferred from a checkpoint's shapes."""
    dimensions = {_PATCHES: 4, _POSITIONS: 3, _FC1: 2, _CODES: 2, _TARGET: 2, _STARTED: 1}
    problems = [
        f"{key}: missing"
        if key not in tensors
        else f"{key}: has shape {list(tensors[key].shape)}, expected {count} dimensions"
        for key, count in dimensions.items()
        if key not in tensors or tensors[key].ndim != count
    ]
    if problems:
        raise ValueError("no released VQ-KD:\n  " + "\n  ".join(problems))
    if not bool(tensors[_STARTED].all()):
        raise ValueError(f"{_STARTED}: 0, its codebook was never started: it is not trained")
    hidden, _, patch, _ = tensors[_PATCHES].shape
    rows = tensors[_POSITIONS].shape[1]
    grid = math.isqrt(max(0, rows - 1))
    if grid < 1 or grid**2 != rows - 1:
        raise ValueError(f"{_POSITIONS}: {rows} rows are not [CLS] and a square of patches")
    if heads is None:
        heads, rest = divmod(hidden, HEAD_WIDTH)
        if rest:
            raise ValueError(f"heads: hidden {hidden} is no multiple of {HEAD_WIDTH}; say how many")
    if heads < 1 or hidden % heads:
        raise ValueError(f"heads: hidden {hidden} can't be shared by {heads}")
    codes, code_dim = tensors[_CODES].shape
    lengths = tensors[_CODES].float().norm(dim=-1)
    if not torch.allclose(lengths, torch.ones(codes), atol=1e-2):
        raise ValueError(f"{_CODES}: its rows are not of length 1")

    def depth(side: str) -> int:
        pattern = re.compile(rf"{side}\.blocks\.(\d+)\.")
        return len({match[1] for key in tensors if (match := pattern.match(key))})

    return VQKDConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden=hidden,
        mlp=len(tensors[_FC1]),
        heads=heads,
        encoder_layers=depth("encoder"),
        decoder_layers=depth("decoder"),
        codebook_size=codes,
        code_dim=code_dim,
        teacher_dim=len(tensors[_TARGET]),
    )


def _check(tensors: Mapping[str, Tensor], config: VQKDConfig) -> None:
    expected = _shapes(config)
    problems = [f"{key}: missing" for key in expected if key not in tensors]
    problems += [f"{key}: unexpected" for key in tensors if key not in expected]
    problems += [
        f"{key}: has shape {list(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and list(tensors[key].shape) != shape
    ]
    if problems:
        raise ValueError("read as VQ-KD, does not fit:\n  " + "\n  ".join(problems))


def _shapes(config: VQKDConfig) -> dict[str, list[int]]:
    """Every released key with its shape."""
    with torch.device("meta"):
        model = {key: list(value.shape) for key, value in VQKD(config).state_dict().items()}
    d, codes = config.hidden, config.codebook_size
    shapes = {theirs: model[ours] for ours, theirs in _pairs(config).items()}
    shapes["decoder.patch_embed.proj.weight"] = [d, config.code_dim, 1, 1]
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        shapes |= {f"{side}.cls_token": [1, 1, d], f"{side}.pos_embed": [1, 1 + config.patches, d]}
        for i in range(layers):
            attention = f"{side}.blocks.{i}.attn"
            shapes |= {f"{attention}.q_bias": [d], f"{attention}.v_bias": [d]}
            shapes[f"{attention}.qkv.weight"] = [3 * d, d]
    return shapes | {  # plus counters that nothing reads
        "quantize.embedding.cluster_size": [codes],
        "quantize.embedding.embed_avg": [codes, config.code_dim],
        _STARTED: [1],
    }


def _pairs(config: VQKDConfig) -> dict[str, str]:
    """Our keys and the released ones, where only the names differ."""
    pairs = {"codebook.vectors": _CODES, "codebook.usage": _USAGE}
    modules = {"embedding.projection": "encoder.patch_embed.proj"}
    for i in (0, 2):
        modules[f"to_code.{i}"] = f"encode_task_layer.{i}"
        modules[f"to_teacher.{i}"] = f"decode_task_layer.{i}"
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        modules[f"{side}.norm.both"] = f"{side}.fc_norm"
        for i in range(layers):
            for ours, theirs in _BLOCK.items():
                modules[f"{side}.blocks.{i}.{ours}"] = f"{side}.blocks.{i}.{theirs}"
    for ours, theirs in modules.items():
        pairs |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    pairs["from_code.bias"] = "decoder.patch_embed.proj.bias"
    return pairs


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = read_arguments(
        "beit3.vqkd_released",
        "Convert a released VQ-KD checkpoint to a tokenizer folder.",
        "a .pth or .safetensors file",
        "the folder to write",
        arguments,
    )
    try:
        config, tensors = load_released(
            options.source, image_size=options.image_size, heads=options.heads
        )
        vqkd.save_tensors(options.target, tensors, config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    grid = config.image_size // config.patch_size
    print(
        f"{options.target}: {config.codebook_size} codes, {grid}x{grid} patches at "
        f"{config.image_size} px, decoder of {config.decoder_layers} layers to "
        f"{config.teacher_dim} features"
    )


if __name__ == "__main__":
    main()
