"""Helpers for benchmarks: time, memory, FLOPs, the machine's name, and fresh processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from beit3.device import synchronise

ROOT = Path(__file__).resolve().parents[1]
_SAMPLING_SECONDS = 0.005


def machine(device: torch.device) -> str:
    """The device, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's part included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def fresh(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments` and read the JSON object on its last line of output.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    # Threads that spin while they wait starve each other as soon as anything else runs.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(lines[-1])


@dataclass
class Peak:
    """Most bytes held above the level at the start."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of a block of code above the level at its start.

    On a GPU it is the allocator's own count. On a CPU it is resident memory, sampled every 5 ms by
    a thread; freed memory is given back to the system first, so that it isn't reused unseen.
    """
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        yield peak
        synchronise(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - level
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    level = resident_bytes()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLING_SECONDS):
            peak.bytes = max(peak.bytes, resident_bytes() - level)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def resident_bytes() -> int:
    """Memory of this process; if the system doesn't tell, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * os.sysconf("SC_PAGE_SIZE")


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention of `work`, as it runs.

    Operations that PyTorch's counter doesn't know count as 0; a CPU's attention is added here.
    """
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return counter.get_total_flops()


_FAMILIES = {
    "attention kernel": r"scaled_dot_product|flash_attention|efficient_attention",
    "matrix products": r"::(addmm|mm|bmm|baddbmm|matmul|linear|_addmm_activation)$|mkldnn|onednn",
    "convolution": r"conv",
    "norms": r"layer_norm",
    "GELU": r"gelu",
    "softmax, cross-entropy": r"softmax|nll_loss|cross_entropy",
    "gathers, embeddings": r"::(index|gather|scatter|embedding|nonzero|masked_select)",
    "copies, casts, concatenation": r"::(copy_|_to_copy|to|cat|stack|clone|contiguous|_?reshape)",
    "fills": r"::(fill_|zero_|zeros|ones|full|masked_fill|new_)",
    "elementwise, sums": r"::(add|sub|mul|div|sum|mean|where|eq|ne|lt|argmax|bitwise|rsub|neg)",
    "compiled kernels": r"cpp_fused|triton|CompiledFunction|Torch-Compiled",
}


def time_by_family(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of `work` by family of operators, most first.

    On a CPU, each operator's own time; on a GPU, that of its kernels.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        work()
        synchronise(device)
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            continue  # a kernel; the operator that launched it has its time too
        named = (name for name, pattern in _FAMILIES.items() if re.search(pattern, event.key))
        family = next(named, "other")
        totals[family] = totals.get(family, 0.0) + spent / 1e6
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
