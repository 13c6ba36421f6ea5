"""Models on a GPU: on one, and without one on a device that holds no values.

The second kind, PyTorch's fake tensors, notices what goes wrong on any GPU: a tensor that was left
on the CPU, and a step that asks the device for a value, for which it would wait.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from masked_steps import PAPER, RELEASED, VARIANTS, assert_same, build, draw, step
from small_models import small_tokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensorMode,
    unset_fake_temporarily,
)

from beit3 import tasks
from beit3.config import Checkpointing, ModelConfig
from beit3.device import pinned, synchronise, to_device
from beit3.flops import StepShape
from beit3.generate import generate
from beit3.memory import activation_bytes
from beit3.model import BEiT3
from beit3.multiway import Layout
from beit3.objectives import DualEncoder, MaskedDataModelling, ObjectiveWeights
from beit3.tasks import Example, Sample
from beit3.text import TextTokenizer
from beit3.vqkd import PRESETS, VQKD, batch_that_fits
from benchmarks._measure import peak_memory

WORDS = replace(PRESETS["tiny"], hidden=32, mlp=64, heads=2, teacher_dim=24)
COLOURS = ("red", "green", "blue")
TARGETS: dict[str, Any] = {
    "vqa": {"answers": ["red"]},
    "nlvr2": True,
    "imagenet": "red",
    "retrieval": "1",
    "captioning": None,
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return small_tokenizer([f"a {colour} circle on sand" for colour in COLOURS] * 20, 60)


def pictures(count: int, side: int = PAPER.image_size) -> Tensor:
    rng = np.random.default_rng(count)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def finetuning(name: str, tokenizer: TextTokenizer) -> tuple[nn.Module, Any]:
    """A task's model, and a training batch for it."""
    task = tasks.create(name, labels=COLOURS if name in ("vqa", "imagenet") else ())
    images = pictures(6).numpy()
    samples = [
        Sample(
            (images[i], images[i + 3])[: 1 + (name == "nlvr2")],
            (Example(str(i), f"a {COLOURS[i]} circle", TARGETS[name]),),
        )
        for i in range(3)
    ]
    rngs = [np.random.default_rng(i) for i in range(3)]
    torch.manual_seed(0)
    module = task.build(replace(RELEASED, vocab_size=tokenizer.vocab_size))
    return module, task.collate(samples, tokenizer, rngs, training=True)


# -- a device that holds no values -----------------------------------------------------------------


@contextmanager
def elsewhere(*there: Any) -> Iterator[tuple[Any, ...]]:
    """Modules and batches on PyTorch's meta device, which mixes with the CPU as little as a GPU."""
    mode, lay_out = FakeTensorMode(), Layout.build

    def copied(value: Any) -> Any:
        with FakeCopyMode(mode):
            return copy.deepcopy(value)

    def laid_out(*arguments: Any, **options: Any) -> Layout:
        """On the CPU, as ever, from where it is moved."""
        with unset_fake_temporarily():
            layout = lay_out(*arguments, **options)
        return copied(layout)

    found = tuple(
        copied(one.to("meta") if isinstance(one, nn.Module) else to_device(one, "meta"))
        for one in there
    )
    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(Layout, "build", laid_out)
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none
        yield found


def trained(module: nn.Module, *arguments: Any) -> set[str]:
    """A training step; the devices of the losses and the gradients."""
    results = module.train()(*arguments)
    results["loss"].backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    return {value.device.type for value in (*results.values(), *gradients)}


@pytest.mark.parametrize("mode", ["none", "blocks", "selective"])
@VARIANTS
def test_a_pretraining_step_stays_on_its_device(config: ModelConfig, mode: Checkpointing) -> None:
    config = replace(config, drop_path=0.4, checkpoint_activations=mode)
    with elsewhere(build(config), draw(config, seed=0)) as (module, batch):
        assert trained(module, batch) == {"meta"}


def test_a_step_with_pixels_as_the_target_stays_on_its_device() -> None:
    module = MaskedDataModelling(PAPER, ObjectiveWeights(image_target="pixels"))
    with elsewhere(module, draw(PAPER, seed=0)) as (module, batch):
        assert trained(module, batch) == {"meta"}


def test_a_contrastive_step_stays_on_its_device() -> None:
    text = torch.arange(4, 20)
    with elsewhere(DualEncoder(RELEASED), pictures(3), text) as (module, images, ids):
        assert trained(module, images, ids, [5, 4, 7]) == {"meta"}


def test_visual_words_stay_on_their_device() -> None:
    images = pictures(3, WORDS.image_size)
    with elsewhere(VQKD(WORDS).eval(), images) as (module, images):
        words = module.encode(images)
        assert module.decode(words).device.type == words.device.type == "meta"


@pytest.mark.parametrize("name", tasks.names())
def test_a_finetuning_step_stays_on_its_device(name: str, tokenizer: TextTokenizer) -> None:
    with elsewhere(*finetuning(name, tokenizer)) as (module, batch):
        assert trained(module, batch) == {"meta"}


def test_what_is_left_on_the_cpu_or_asked_for_is_noticed() -> None:
    with elsewhere(build(PAPER), draw(PAPER, seed=0)) as (module, batch):
        loss = module(batch)["loss"].detach()
        with pytest.raises(DataDependentOutputException):
            float(loss)
        left = replace(batch, hidden_patches=torch.zeros(batch.hidden_patches.shape).bool())
        with pytest.raises(RuntimeError, match="on the same device"):
            module(left)


# -- a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@VARIANTS
def test_a_gpu_computes_what_the_cpu_does(config: ModelConfig, gpu: torch.device) -> None:
    batch = draw(config, seed=1)
    found = step(build(config).to(gpu), to_device(batch, gpu))
    found = {name: value.cpu() for name, value in found.items()}
    # A GPU may convolve in TF32, whose fraction has 10 bits.
    assert_same(found, step(build(config), batch), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(gpu: torch.device) -> None:
    """Compiling and the like aside, which is what the first step is for."""
    module, batch = build(PAPER).to(gpu), to_device(draw(PAPER, seed=1), gpu)
    for mode in ("default", "error"):
        if gpu.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast(gpu.type, torch.bfloat16):
                loss = module(batch)["loss"]
            loss.backward()
        finally:
            if gpu.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "blocks", "selective"])
def test_activations_take_of_a_gpu_what_the_formula_says(
    mode: Checkpointing, gpu: torch.device
) -> None:
    if gpu.type == "cpu":
        pytest.skip("nobody counts a CPU's tensors")
    config = replace(
        PAPER, layers=6, hidden=256, mlp=1024, image_size=224, patch_size=16, vocab_size=8192,
        max_text_length=128, checkpoint_activations=mode,
    )  # fmt: skip
    module, batch = build(config).to(gpu), to_device(draw(config, 0, images=48, pairs=16), gpu)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def train() -> None:
        with torch.autocast(gpu.type, torch.bfloat16):
            loss = module(batch)["loss"]
        loss.backward()

    train()  # libraries take their workspaces
    with peak_memory(gpu) as peak:
        train()
    formula = activation_bytes(config, StepShape.of(batch), "bf16")
    assert peak.bytes == pytest.approx(formula, rel=0.5)  # masks and workspaces are not in it


@pytest.mark.gpu
def test_pinned_batches_arrive_whole(gpu: torch.device) -> None:
    batch = draw(PAPER, seed=1)
    if gpu.type == "cuda":
        page_locked = pinned(batch, gpu)
        assert page_locked.images.is_pinned() and page_locked.layout.positions.is_pinned()
        batch = page_locked
    moved = to_device(batch, gpu)
    synchronise(gpu)
    assert moved.masked.keys() == batch.masked.keys() and moved.lengths == batch.lengths
    for one, other in ((moved.images, batch.images), (moved.read.places, batch.read.places)):
        for tensor, wanted in zip(one, other, strict=True):
            assert tensor.device.type == gpu.type and torch.equal(tensor.cpu(), wanted)


@pytest.mark.gpu
def test_a_gpu_finds_the_words_that_the_cpu_finds(gpu: torch.device) -> None:
    torch.manual_seed(0)
    module, images = VQKD(WORDS).eval(), pictures(64, WORDS.image_size)
    words = module.encode(images)
    module = module.to(gpu)
    batch = batch_that_fits(module)
    assert batch >= 1 and batch & (batch - 1) == 0
    found = torch.cat([module.encode(part.to(gpu)).cpu() for part in images.split(batch)])
    # Of two codes that are equally near, either may be chosen.
    assert (found == words).float().mean() > 0.99


@pytest.mark.gpu
def test_a_gpu_writes_the_captions_that_the_cpu_writes(
    tokenizer: TextTokenizer, gpu: torch.device
) -> None:
    torch.manual_seed(0)
    backbone = BEiT3(replace(RELEASED, vocab_size=tokenizer.vocab_size)).eval()
    head = nn.Linear(RELEASED.hidden, tokenizer.vocab_size)
    module, images = nn.ModuleList([backbone, head]), pictures(4)

    def captions(device: torch.device | str) -> list[tuple[int, ...]]:
        module.to(device)
        found = generate(backbone, head, images.to(device), tokenizer, max_length=8, beams=3)
        return [tuple(one.ids) for one in found]

    assert captions(gpu) == captions("cpu")
