"""The one training loop: Ray Train starts the workers, DeepSpeed runs the steps.

Pretraining, VQ-KD, the contrastive stage and finetuning differ in their `Recipe`; the loop, the
schedule, checkpoints, resume and tracking are shared. A run that was killed anywhere, or a worker
that Ray restarts, goes on from the newest sound checkpoint, on any number of workers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3.device import to_device
from beit3.optimisation import cosine_schedule, parameter_groups
from pipelines import bundles, checkpoints, console, tracking
from pipelines.loader import Prefetcher
from pipelines.storage import Store, StoreError


@dataclass(frozen=True)
class TrainConfig:
    """How a run is optimised and where it runs."""

    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    warmup: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 3.0
    """Largest norm of the gradient; 0 turns clipping off."""
    layer_decay: float = 1.0
    """Learning-rate factor from each layer to the one below it."""
    head_scale: float = 1.0
    """Learning-rate multiplier of everything outside the backbone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer's state, 2 the gradients too."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    seed: int = 0
    workers: int = 1
    """Ray Train workers; 0 trains in the job's own process, without starting another."""
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    threads: int = 0
    """Torch threads of a worker on CPU; 0: the machine's CPUs shared by the workers."""
    max_failures: int = 3
    """How often Ray restarts the workers before the run fails."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"train.steps: expected at least 1, got {self.steps}")
        if self.warmup >= self.steps:
            raise ValueError(f"train.warmup {self.warmup} is not below train.steps {self.steps}")
        if self.gpus_per_worker and not self.workers:
            raise ValueError("train.gpus_per_worker needs train.workers of at least 1")


class Recipe(Protocol):
    """What a run trains. Must be picklable: it travels to the workers."""

    def build(self) -> nn.Module:
        """The module; its forward takes a batch and returns a dict with `loss` and other scalars.

        Parts that are not the model's own start from a backbone named `backbone`.
        """
        ...

    def batches(self, rank: int, world: int) -> Callable[[int], Any]:
        """A function from the number of a batch to this worker's share of it, on CPU."""
        ...

    def samples_per_batch(self) -> int:
        """Samples of a batch over all workers."""
        ...

    def layers(self) -> int:
        """Blocks of the backbone, for layer-wise decay."""
        ...

    def evaluate(self, module: nn.Module, step: int, logger: tracking.Logger) -> dict[str, float]:
        """Scores on held-out data and pictures; called on rank 0."""
        ...

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the model's files to a local folder; returns notes for its manifest."""
        ...


@dataclass(frozen=True)
class Run:
    """A training run: where it lives, what it trains, and what it leaves."""

    store_uri: str
    name: str
    """Folder of the run in the store, e.g. `runs/base`."""
    output: str
    """Name of the bundle with the trained model, e.g. `models/base`."""
    fingerprint: str
    recipe: Recipe
    config: TrainConfig
    tracking: tracking.RunHandle | None = None
    tuned: bool = False
    """Part of a Ray Tune trial: evaluations are reported to it, and it may stop the run."""


def fit(
    store: Store,
    *,
    name: str,
    output: str,
    fingerprint: str,
    recipe: Recipe,
    config: TrainConfig,
    parameters: Mapping[str, Any],
    parent: str | None = None,
    track: bool = True,
    tuned: bool = False,
) -> dict[str, Any]:
    """Train, or skip what is trained, or go on with what was interrupted.

    Args:
        fingerprint: Hash of configuration and inputs; a finished run with another is an error.
        parameters: Flat values for the tracker.
        parent: MLflow run under which this one is nested.
        tuned: Report evaluations to the Ray Tune trial that this is called in.

    Returns:
        The result: `metrics` of the last evaluation, `steps`, `mlflow_run`.

    Raises:
        StoreError: the store or the tracker can't be used, or the output's name is taken.
    """
    run_folder = f"runs/{name}"
    if bundles.exists(store, output):
        found = bundles.info(store, output)
        if found["fingerprint"] != fingerprint:
            raise StoreError(
                f"{store.uri}/{output} exists and was trained from other inputs or options: choose "
                "another name, or delete that folder and its run first"
            )
        console.say(f"{output}: already trained ({found['steps']} steps), skipped")
        if tuned:  # the sweep was killed between the model and its score
            import ray.tune

            ray.tune.report({**found["metrics"], "step": found["steps"]})
        return found
    store.check_writable()
    _claim(store, run_folder, fingerprint)
    handle = None
    if track:
        handle = tracking.start_run(store, name, parameters, key=run_folder, parent=parent)
    run = Run(store.uri, run_folder, output, fingerprint, recipe, config, handle, tuned)
    store.delete(f"{run_folder}/progress.json")  # what an interrupted run said last
    try:
        with _progress(store, run):
            _launch(run)
    except BaseException as error:
        stopped = tuned and isinstance(error, SystemExit)  # by Tune: the sweep says how it ended
        if handle is not None and not stopped:
            with contextlib.suppress(Exception):
                tracking.finish_run(handle, "FAILED")
        raise
    if handle is not None:
        tracking.finish_run(handle)
    result = bundles.info(store, output)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items())
    console.say(f"{output}: trained ({config.steps:,} steps){'; ' if shown else ''}{shown}")
    return result


def _claim(store: Store, folder: str, fingerprint: str) -> None:
    """Note what the run comes from; an interrupted run of other options is an error."""
    note = f"{folder}/run.json"
    if store.exists(note) and store.read_json(note)["fingerprint"] != fingerprint:
        raise StoreError(
            f"{store.uri}/{folder} was begun with other inputs or options: choose another name, or "
            "delete that folder first"
        )
    store.write_json(note, {"fingerprint": fingerprint})


def _launch(run: Run) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = run.config
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=f"{run.name.replace('/', '-')}-{uuid.uuid4().hex[:6]}",
            storage_path=f"{run.store_uri}/{run.name}/ray",
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=_tune_callbacks(run),
        ),
    )
    trainer.fit()


def _tune_callbacks(run: Run) -> list[Any]:
    if not (run.tuned and run.config.workers):
        return []
    from ray.tune.integration.ray_train import TuneReportCallback

    return [TuneReportCallback()]


# -- the worker ----------------------------------------------------------------------------------


def _worker(arguments: dict[str, Any]) -> None:
    run: Run = arguments["run"]
    store = Store(run.store_uri)
    rank, world, device = _join(run.config)
    torch.manual_seed(run.config.seed)
    module = run.recipe.build().to(device)
    engine = _engine(run, module, world)
    said: list[str] = []  # the job's process shows it: a worker's own console is out of sight
    start = checkpoints.restore(store, run.name, engine, said.append)
    if start:
        said.append(f"{run.name}: resumed from step {start}")
    handle = run.tracking if rank == 0 else None
    with tracking.Logger(handle) as logger:
        clock = _Clock(run, store, logger, start, said) if rank == 0 else None
        metrics = _steps(run, store, engine, logger, clock, start, rank, world, device)
        if rank == 0:
            _publish(run, store, engine.module, metrics)
            logger.metrics(run.config.steps, {f"final/{k}": v for k, v in metrics.items()})
    if world > 1:
        dist.barrier()
    if run.tuned:  # now that the model is there
        _report(run.config, {**metrics, "step": run.config.steps})
    engine.destroy()
    if not run.config.workers:  # this process may train again: leave no group behind
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def _steps(
    run: Run,
    store: Store,
    engine: Any,
    logger: tracking.Logger,
    clock: _Clock | None,
    start: int,
    rank: int,
    world: int,
    device: torch.device,
) -> dict[str, float]:
    config = run.config
    make = run.recipe.batches(rank, world)
    batches = Prefetcher(make, range(start * config.accumulate, config.steps * config.accumulate))
    metrics: dict[str, float] = {}
    try:
        for step in range(start, config.steps):
            # Dropout and the like are a function of the step, so that a resumed run repeats them.
            torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)
            _set_learning_rate(engine, config, step)
            engine.module.train()
            wait = 0.0
            results: dict[str, Tensor] = {}
            for _ in range(config.accumulate):
                before = time.monotonic()
                batch = to_device(next(batches), device)
                wait += time.monotonic() - before
                results = engine(batch)
                engine.backward(results["loss"])
                engine.step()
            done = step + 1
            last = done == config.steps
            every = config.checkpoint_every
            save = bool(every) and done % every == 0 and not last
            if done % config.log_every == 0 or save or last:
                values = _mean_over_workers(results, world)
                if not all(v == v for v in values.values()):
                    raise FloatingPointError(f"loss is not a number at step {done}: {values}")
                if clock:
                    clock.log(done, values, engine, wait)
            if clock:
                clock.show(done)
            if save:
                logger.flush(10.0)  # a run that goes on from here doesn't log these steps again
                checkpoints.save(
                    store, run.name, done, engine, rank=rank, keep=config.keep_checkpoints
                )
            if last or (config.evaluate_every and done % config.evaluate_every == 0):
                if rank == 0:
                    engine.module.eval()
                    with torch.no_grad():
                        metrics = run.recipe.evaluate(engine.module, done, logger)
                    logger.metrics(done, {f"eval/{k}": v for k, v in metrics.items()})
                if run.tuned and not last:  # Tune may end this process in here
                    logger.flush()
                    _report(config, {**metrics, "step": done})
                elif world > 1:
                    dist.barrier()
    finally:
        batches.close()
    return metrics


def _report(config: TrainConfig, metrics: dict[str, float]) -> None:
    """Tell Ray Tune how the trial fares; every worker must call this."""
    if config.workers:
        import ray.train

        ray.train.report(metrics)
    else:
        import ray.tune

        ray.tune.report(metrics)


def _publish(run: Run, store: Store, module: nn.Module, metrics: dict[str, float]) -> None:
    module.eval()
    with tempfile.TemporaryDirectory() as temporary:
        notes = run.recipe.export(module, Path(temporary))
        result = {
            "fingerprint": run.fingerprint,
            "steps": run.config.steps,
            "metrics": metrics,
            "run": run.name,
            "mlflow_run": run.tracking.run_id if run.tracking else None,
            **notes,
        }
        bundles.save(store, run.output, Path(temporary), result)


def _join(config: TrainConfig) -> tuple[int, int, torch.device]:
    """Join the workers' process group; returns rank, number of workers and device."""
    import ray.train
    import ray.train.torch

    rank, world, local_rank = 0, 1, 0
    if config.workers:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        local_rank = context.get_local_rank()
    if config.gpus_per_worker:
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        threads = config.threads or max(1, (os.cpu_count() or 1) // max(1, config.workers))
        torch.set_num_threads(threads)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not dist.is_initialized():  # in the job's own process there is no group yet
        meeting = Path(tempfile.mkdtemp()) / "group"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    return rank, world, device


def _engine(run: Run, module: nn.Module, world: int) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPU it would compile an all-reduce of its own. gloo's will do: it needs no compiler,
        # and a build that was killed would leave a lock file that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        config = run.config
        groups = parameter_groups(
            module,
            weight_decay=config.weight_decay,
            layers=run.recipe.layers(),
            layer_decay=config.layer_decay,
            head_scale=config.head_scale,
        )
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # ours is a packed batch: one object a step
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def _set_learning_rate(engine: Any, config: TrainConfig, step: int) -> None:
    rate = cosine_schedule(
        step,
        peak=config.learning_rate,
        warmup=config.warmup,
        steps=config.steps,
        floor=config.min_learning_rate,
    )
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _mean_over_workers(results: Mapping[str, Tensor], world: int) -> dict[str, float]:
    """Scalars averaged over the workers that have them; every worker must call this."""
    own = {k: float(v.detach()) for k, v in results.items() if v.numel() == 1}
    if world == 1:
        return own
    everyone: list[dict[str, float] | None] = [None] * world
    dist.all_gather_object(everyone, own)
    names = sorted({name for one in everyone if one for name in one})
    values = {name: [one[name] for one in everyone if one and name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


# -- what a person sees ----------------------------------------------------------------------------


class _Clock:
    """Logs a step's numbers and tells the job's process how far the run is."""

    def __init__(
        self, run: Run, store: Store, logger: tracking.Logger, start: int, said: list[str]
    ) -> None:
        self.run, self.store, self.logger, self.said = run, store, logger, said
        self.last_log, self.last_step = time.monotonic(), start
        self.last_shown = 0.0
        self.note = ""
        if said:
            self.show(start)

    def log(self, step: int, values: dict[str, float], engine: Any, wait: float) -> None:
        now = time.monotonic()
        steps = max(1, step - self.last_step)
        seconds = max(1e-9, now - self.last_log)
        per_step = self.run.recipe.samples_per_batch() * self.run.config.accumulate
        groups = engine.optimizer.param_groups
        extra = {
            "learning_rate": max(group["lr"] for group in groups),
            "samples_per_second": per_step * steps / seconds,
            "data_wait_seconds": wait,
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            extra["gradient_norm"] = float(norm)
        self.logger.metrics(step, {f"train/{k}": v for k, v in {**values, **extra}.items()})
        self.last_log, self.last_step = now, step
        self.note = f"loss {values['loss']:.3f}"

    def show(self, step: int) -> None:
        now = time.monotonic()
        if now - self.last_shown > 1.0 or step == self.run.config.steps:
            self.last_shown = now
            body = json.dumps({"step": step, "note": self.note, "said": self.said})
            with contextlib.suppress(OSError):
                self.store.write(f"{self.run.name}/progress.json", body.encode())


def progress(store: Store, run: str) -> int:
    """Steps that a run has done, as it last said."""
    try:
        return int(json.loads(store.read(f"{run}/progress.json"))["step"])
    except (OSError, ValueError, KeyError):
        return 0


@contextlib.contextmanager
def _progress(store: Store, run: Run) -> Iterator[None]:
    """Show the workers' progress on the console of the job's process."""
    stop = threading.Event()

    def watch() -> None:
        with console.bar(run.name, total=run.config.steps, unit="step") as bar:
            bar.set_postfix_str("starting workers", refresh=False)
            begun, said = False, []
            while True:
                ended = stop.wait(1.0)
                with contextlib.suppress(OSError, ValueError, KeyError):
                    seen = json.loads(store.read(f"{run.name}/progress.json"))
                    if seen["said"] != said:  # workers started, perhaps not for the first time
                        said = seen["said"]
                        for line in said:
                            console.say(line)
                    if not begun:  # the time left is of the steps, not of starting the workers
                        begun = True
                        bar.initial = bar.n = seen["step"]
                        bar.start_t = bar.last_print_t = time.time()
                    bar.set_postfix_str(seen["note"], refresh=False)
                    bar.update(seen["step"] - bar.n)
                if ended:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
