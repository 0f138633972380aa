"""The training loop: one flat function from a config to a finished, resumable run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matilda_ckpt import Checkpointer, Keep, RngState
from matilda_train.autopsy import Autopsies
from matilda_train.batches import BatchReader, chain_hash
from matilda_train.build import (
    build_model,
    build_optimizer,
    check_kernels,
    compile_blocks,
    compile_model,
    token_byte_lengths,
)
from matilda_train.cadence import Cadence
from matilda_train.compile_cache import CompileCache
from matilda_train.config import RunConfig
from matilda_train.config_load import shared_fields
from matilda_train.console import Display, SilentDisplay
from matilda_train.data_source import (
    SyntheticStream,
    TokenStream,
    choose_data_dir,
    makes_corpus,
    open_streams,
)
from matilda_train.distributed import Ranks
from matilda_train.dry_run import passing_run_dir, shorten
from matilda_train.errors import TrainingDivergedError
from matilda_train.evals.in_training import IntervalTasks, describe_scores
from matilda_train.evaluation import evaluate
from matilda_train.gpu_health import GpuHealth
from matilda_train.group_rms import GroupRms
from matilda_train.guards import StepGuard, clip_gradients, diverged_if_not_finite
from matilda_train.hardware import choose_device, choose_dtype, numerics, seed_generators
from matilda_train.loop_state import LoopState, TrainResult
from matilda_train.lost_checkpoints import describe_lost, finished_step
from matilda_train.meter import Meter, describe_row
from matilda_train.metrics_log import EventLog, MetricsLog
from matilda_train.micro_batch import settle_micro_batch
from matilda_train.phases import PhaseClock
from matilda_train.preparation import prepare_corpus
from matilda_train.provenance import collect_provenance
from matilda_train.rollback import Rollbacks
from matilda_train.run_dir import RunDir
from matilda_train.sample import check_sample_prompt, sample_text
from matilda_train.schedules import Schedules
from matilda_train.sharding import WholeState, gather_state, shard_model, whole_model
from matilda_train.time_account import GoodputLedger, describe_lost_work
from matilda_train.wandb_log import WandbMirror, has_unsent_rows, require_wandb
from matilda_train.watchdog import Watchdog

__all__ = ["train"]


def train(
    config: RunConfig,
    *,
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    dry_run: bool = False,
    stop: Callable[[], bool] = lambda: False,
    display: Display | None = None,
    on_phase: Callable[[str], None] | None = None,
    wait_for_turn: Callable[[Callable[[], bool]], None] | None = None,
) -> TrainResult:
    """Train `config` in `run_dir`, going on from its newest healthy checkpoint if there is one.

    `stop()` is asked at every safe point; once true, the state is saved and the result's status
    is "preempted". A dry run takes at most 20 small steps on synthetic tokens and keeps nothing.
    `on_phase(name)` is called whenever the run begins to do something else; see `PHASES`.
    `wait_for_turn(stop)` is called once, when the first step has ended and all is compiled; it may
    wait for the device as long as it asks the `stop` it is given.

    Raises `ValueError` for whatever the user can mend (config, data, run directory),
    `TrainingDivergedError` after too many non-finite steps or rollbacks, and `OSError` or
    `matilda_ckpt.CheckpointError` when the disk fails; the newest checkpoint stands in each case.
    """
    with ExitStack() as cleanup:
        phase, state = PhaseClock(on_phase), LoopState()
        watchdog = Watchdog(
            config.train.hang_seconds,
            phase=phase,
            step=lambda: state.step,
            run_dir=None if dry_run else Path(run_dir),
        )
        stop = cleanup.enter_context(watchdog).listen(stop)
        device = choose_device(config.train.device)
        ranks = cleanup.enter_context(Ranks.join(device))
        watchdog.exchange(ranks.store, ranks.world_size)
        device = ranks.own_device(device)
        display = display if display is not None and ranks.is_main else SilentDisplay()
        cleanup.enter_context(
            numerics(device, deterministic=config.train.deterministic, threads=config.train.threads)
        )

        mirrored = config.log.wandb and ranks.is_main and not dry_run
        if mirrored:
            require_wandb()

        compile_cache = CompileCache(
            Path(run_dir) / "compile-cache",
            device,
            enabled=config.train.compile and not dry_run,
            writes=ranks.is_main,
        )
        cleanup.callback(compile_cache.close)

        stream: TokenStream
        held_out: TokenStream
        if dry_run:
            run_dir = cleanup.enter_context(passing_run_dir(ranks))
            config = settle_micro_batch(config, device, ranks, note=display.note)
            config = shorten(config, device, ranks.world_size)
            stream, held_out = SyntheticStream.pair(config.model.vocab_size, config.seq_len)
        else:
            data = choose_data_dir(data_dir, config, run_dir)
            corpus = makes_corpus(data_dir, config)
            if data != Path(config.data.dir or "data"):  # what reads the run later finds them
                config = replace(config, data=replace(config.data, dir=str(data)))
            if ranks.is_main and corpus:
                with phase.during("preparing data"):
                    prepare_corpus(config.data, data, stop=stop, display=display)
            if ranks.any(stop()):
                return TrainResult("preempted", Path(run_dir), 0)
            ranks.barrier()
            stream, held_out = open_streams(config, data)
            config = settle_micro_batch(
                config, device, ranks, run_dir=Path(run_dir), note=display.note
            )
        config.grad_accum_steps(ranks.world_size)  # refuses a batch that does not divide
        ranks.require_same(data_id=stream.data_id, **shared_fields(config))
        plan = config.plan
        tasks = IntervalTasks(config, ranks)
        check_sample_prompt(config)

        run_dir = Path(run_dir)
        events = EventLog(run_dir / "events.jsonl", enabled=ranks.is_main)
        cleanup.enter_context(
            diverged_if_not_finite(lambda: events.write("diverged", step=state.step))
        )
        if ranks.is_main:
            opened = RunDir.open(
                run_dir,
                config,
                data_id=stream.data_id,
                provenance=lambda: collect_provenance(device) | {"world_size": ranks.world_size},
            )
            cleanup.callback(opened.close)
            for change in opened.describe_changes():
                display.note(change)
        ranks.barrier()
        run = RunDir.read(run_dir)
        finished = finished_step(run_dir, display.note)
        ranks.require_same(run_id=run["run_id"], finished=finished)
        if finished is not None:
            if mirrored and has_unsent_rows(run_dir):
                WandbMirror(config.log, run_dir, display.note).close()
            return TrainResult("already_finished", run_dir, finished)

        compile_cache.load()
        seed_generators(config.train.seed)
        model = build_model(config, device, choose_dtype(config.train.dtype, device))
        if device.type == "cuda" and config.train.check_kernels:
            checks = check_kernels(
                model, stream.windows(0, 2), device, fall_back=ranks.world_size == 1
            )
            wrong = sorted({check.kernel for check in checks if not check.ok})
            worst = max(checks, key=lambda check: check.error)
            events.write("kernels", largest_error=worst.error, of=worst.quantity, replaced=wrong)
            for name in wrong:
                display.note(f"the `{name}` kernel is wrong on this machine: the plain one is used")
        sharded = ranks.world_size > 1 and config.train.parallel == "fsdp"
        if sharded:
            shard_model(model, device, ranks.world_size)
        distribute = "none" if sharded or ranks.world_size == 1 else config.optim.distribute
        optimizer = build_optimizer(config.optim, model, distribute=distribute)
        schedules = Schedules(config, optimizer)
        guard = StepGuard(
            device,
            policy=config.train.spike_policy,
            threshold=config.train.spike_threshold,
            warmup_steps=config.train.spike_warmup_steps,
        )
        everything = {
            "model": WholeState(model) if sharded else model,
            "optimizer": WholeState(optimizer) if sharded else optimizer,
            "stream": stream,
            "loop": state,
            "guard": guard,
            "rng": RngState("current"),
        }
        checkpoints = Checkpointer(
            run_dir / "checkpoints",
            keep=Keep(last=config.ckpt.keep_last, every=config.ckpt.keep_every),
            run_id=run["run_id"],
            read_only=not ranks.is_main,
        )
        cleanup.callback(checkpoints.close)
        rollbacks = Rollbacks(run_dir, config, stream, events)
        with phase.during("restoring"), ranks.main_first():
            restored = checkpoints.restore(everything, accept=rollbacks.accept)
        ranks.require_same(**state.state_dict())
        for lost in describe_lost(run_dir, restored):
            display.note(lost)
        with ranks.main_first():
            metrics = MetricsLog(
                run_dir / "metrics.jsonl",
                step=state.step if restored else -1,
                enabled=ranks.is_main,
            )
        cleanup.callback(metrics.close)
        mirror = WandbMirror(config.log, run_dir, display.note) if mirrored else None
        if mirror is not None:
            cleanup.callback(mirror.close)
        saved_step = durable_step = state.step if restored else -1
        if restored:
            display.note(f"resuming at step {state.step:,} from {restored.path}")
        events.write(
            "resume" if restored else "start",
            step=state.step,
            seconds=phase.seconds(),
            discarded_rows=metrics.discarded_rows,
            **describe_lost_work(metrics.discarded),
            skipped_checkpoints=[str(skip) for skip in restored.skipped] if restored else [],
            changed=opened.changes if ranks.is_main else {},
        )

        # Sampling keeps to `model` itself: its shapes change with every token.
        compiled: nn.Module = model
        if config.train.compile and ranks.world_size == 1:
            compiled = compile_model(model)
        elif config.train.compile:
            compile_blocks(model)
        wrapped = ranks.wrap(compiled, device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        reader = BatchReader(
            stream.windows,
            batch_size=config.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            pin_memory=device.type == "cuda",
        )
        cleanup.callback(reader.close)
        token_bytes = token_byte_lengths(config)
        meter = Meter(config, device, ranks.world_size)
        evaluations = Cadence(config.eval.interval, plan, ranks.any)
        saves = Cadence(config.ckpt.interval, plan, ranks.any, also_steps=config.ckpt.also_steps)
        rows = Cadence(config.log.interval, plan, ranks.any)
        ledger = GoodputLedger(run_dir, phase, enabled=ranks.is_main)
        health = GpuHealth(device)
        cleanup.callback(health.close)
        group_rms = GroupRms(optimizer.param_groups, config.log.rms_every_steps, ranks)
        gc.freeze()
        cleanup.callback(gc.unfreeze)

        rolls_back = config.train.spike_policy == "rollback"
        autopsies = Autopsies(run_dir, config, guard, stream, note=display.note)
        display.begin("training", total=config.train.total_steps, done=state.step)
        first_step = state.step
        while True:
            at_end = state.step == config.train.total_steps
            evaluation_due = evaluations.due(state.step) or at_end
            tasks_due = tasks.due(state.step, with_evaluation=evaluation_due, at_end=at_end)
            evaluation_due = evaluation_due or tasks_due
            save_due = (saves.due(state.step) and (state.step > 0 or rolls_back)) or at_end
            row_due = rows.due(state.step)
            stopping = ranks.any(stop())

            # The step before. On a GPU its verdict is awaited only where something hangs on it.
            if guard.pending and (guard.known or row_due or evaluation_due or save_due or stopping):
                verdict = guard.read()
                if row_due or verdict.objection:
                    row: dict[str, Any] = {
                        "step": state.step,
                        "tokens": plan.tokens(state.step),
                        "batch_tokens": plan.tokens_per_step(state.step - 1),
                        "seq_len": plan.seq_len(state.step - 1),
                        **verdict.figures(),
                        "batch_sha256": state.batch_hash,
                        **schedules.learning_rates(),
                        **group_rms.measure(state.step),
                        **meter.measure(),
                        **health.read(),
                    }
                    metrics.write(ledger.stamp(row))
                    if mirror is not None:
                        mirror.look()
                    display.advance(state.step, describe_row(row))
                if verdict.objection:
                    events.write(
                        "spike" if verdict.spike else "skip",
                        step=state.step,
                        consecutive=verdict.consecutive,
                        **verdict.figures(),
                    )
                    display.note(f"step {state.step:,}: {verdict}")
                    alone = whole_model(model)
                    if ranks.is_main:
                        with phase.during("examining"):
                            autopsies.examine(
                                state.step, state.batch_hash, verdict, alone, rollbacks
                            )
                if verdict.consecutive >= config.train.max_consecutive_skips:
                    events.write("diverged", step=state.step)
                    raise TrainingDivergedError(
                        f"Loss or gradient was not finite in {verdict.consecutive} steps in a "
                        f"row, up to step {state.step}"
                    )
                if verdict.spike and rolls_back:
                    checkpoints.finish()
                    if durable_step < saved_step:
                        events.write("save", step=saved_step, seconds=phase.seconds())
                    reader.forget()
                    ranks.barrier()
                    # Durable by one event: killed after it, the run does what follows when started.
                    if rollbacks.decide(state.step, checkpoints.list()):
                        with phase.during("restoring"), ranks.main_first():
                            checkpoints.restore(everything, accept=rollbacks.accept)
                        ranks.require_same(**state.state_dict())
                        with ranks.main_first():
                            metrics.rewind(state.step)
                        saved_step = durable_step = state.step
                        ledger = GoodputLedger(run_dir, phase, enabled=ranks.is_main)
                        events.write(
                            "rolled_back",
                            step=state.step,
                            seconds=phase.seconds(),
                            discarded_rows=metrics.discarded_rows,
                            **describe_lost_work(metrics.discarded),
                        )
                        display.note(f"rolled back to step {state.step:,}")
                        continue
                    display.note("no checkpoint from before the spike is left to roll back to")

            if evaluation_due and metrics.evaluated_step != state.step:
                phase.enter("evaluating")
                evaluation = evaluate(
                    wrapped,
                    held_out,
                    max_tokens=config.eval.tokens,
                    seq_len=config.seq_len,
                    micro_batch_size=config.micro_batch_size,
                    token_bytes=token_bytes,
                    device=device,
                    ranks=ranks,
                    should_stop=stop,
                )
                scores = tasks.score(whole_model(model), should_stop=stop) if tasks_due else {}
                if evaluation is not None and scores is not None:
                    metrics.write(ledger.stamp({"step": state.step} | asdict(evaluation) | scores))
                    display.note(f"step {state.step:,}: {evaluation}{describe_scores(scores)}")
                stopping = ranks.any(stop())

            if durable_step < saved_step and (save_due or stopping or checkpoints.poll()):
                checkpoints.finish()
                durable_step = saved_step
                events.write("save", step=durable_step, seconds=phase.seconds())
            if (save_due or stopping) and saved_step != state.step:
                wait = at_end or stopping or not config.ckpt.background
                phase.enter("saving")
                stream.check_untouched()  # before anything is kept of what was read
                metrics.sync()
                whole = gather_state(everything)
                if ranks.is_main:
                    checkpoints.save(
                        state.step,
                        whole,
                        metrics=metrics.newest_evaluation,
                        provenance={k: run[k] for k in ("run_id", "config_sha256", "data_id")},
                        nonfinite="refuse",
                        wait=wait,
                        defer_copy=not wait,
                    )
                compile_cache.save()
                ranks.barrier()
                saved_step = state.step
                if wait:
                    durable_step = saved_step
                    events.write("save", step=durable_step, seconds=phase.seconds())
            if stopping:
                events.write("preempted", step=state.step, seconds=phase.seconds())
                return TrainResult("preempted", run_dir, state.step)
            if at_end:
                break

            phase.enter_step()
            meter.begin_step()
            batch_size, seq_len = plan.batch_size(state.step), plan.seq_len(state.step)
            grad_accum_steps = config.grad_accum_steps(ranks.world_size, state.step)
            following = plan.batch_size(state.step + 1)
            batch = reader.read(stream.next_sample, batch_size, following=following)
            meter.data_arrived()
            loss = torch.zeros((), device=device)
            micro_batches = batch.micro_batches(config.micro_batch_size, device, seq_len=seq_len)
            for micro_step, (inputs, targets) in enumerate(micro_batches, start=1):
                with ranks.accumulate(wrapped, last=micro_step == grad_accum_steps):
                    micro_loss = wrapped(inputs, targets).loss / grad_accum_steps
                    micro_loss.backward()
                loss += micro_loss.detach()
                if stop() and ranks.world_size == 1:
                    break
            if micro_step < grad_accum_steps:
                optimizer.zero_grad(set_to_none=True)
                continue  # asked to stop: this step is redone, whole, after the resume

            if guard.objects():
                optimizer.zero_grad(set_to_none=True)
                continue  # dealt with first; this step is redone from the same weights

            checkpoints.wait_copied()
            schedules.apply(state.step)
            clip_gradients(parameters, config.train.grad_clip, ranks.mean_(loss), guard)
            with group_rms.watch(state.step + 1):
                optimizer.step()  # changes nothing where the guard vetoes
            optimizer.zero_grad(set_to_none=True)
            stream.next_sample += batch_size
            state.batch_hash = chain_hash(state.batch_hash, batch.sha256)
            state.step += 1
            meter.end_step(batch_size * config.seq_len, seq_len)
            if state.step == first_step + 1:
                if compile_cache.enabled:
                    events.write("compiled", step=state.step, graphs=compile_cache.account())
                    compile_cache.save()  # the next machine has it, even if no checkpoint follows
                if config.ckpt.background:
                    whole = gather_state(everything)
                    if ranks.is_main:
                        checkpoints.reserve(whole)  # the optimizer's state exists only now
                if wait_for_turn is not None:
                    wait_for_turn(stop)

        phase.enter("sampling")
        sample = None
        alone = whole_model(model)
        if ranks.is_main:
            sample = sample_text(alone, config)
            opened.write_sample(state.step, sample)
        events.write("finish", step=state.step, seconds=phase.seconds())
        return TrainResult(
            "finished",
            run_dir,
            state.step,
            first_bits_per_byte=metrics.evaluations[0]["val_bits_per_byte"],
            final_bits_per_byte=metrics.evaluations[-1]["val_bits_per_byte"],
            sample=sample,
        )
