"""``train``: one call from a configuration to a saved segmenter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ntpseg.generation.options import DecodingOptions, NonFiniteOutput
from ntpseg.models.bundle import DECODING, Bundle
from ntpseg.tokenizers.pixel_cache import PixelSource
from ntpseg.training.arguments import training_arguments
from ntpseg.training.attention import check_attention, run_attention
from ntpseg.training.budget import TimeBudget
from ntpseg.training.builders import default_decoding, make_datasets, make_model
from ntpseg.training.callbacks import JsonLog, RunTensorBoard, TrainingProgress
from ntpseg.training.checkpoint import checkpoints, choose_checkpoint, last_checkpoint
from ntpseg.training.config import RunConfig, check_same_run, dump_config
from ntpseg.training.decoding_choice import choose_decoding
from ntpseg.training.distributed import end_processes, rank, renew_store
from ntpseg.training.hang import HangWatch, watch_seconds
from ntpseg.training.hardware import keep_freed_memory
from ntpseg.training.interruption import TrainingInterrupted
from ntpseg.training.launch import is_restart, mark
from ntpseg.training.model_config import prompt_has_codes
from ntpseg.training.parallelism import Parallelism, data_parallel_size, fit_batch
from ntpseg.training.preparation import PREPARED, Prepared, prepare_run
from ntpseg.training.profiling import ProfileSteps
from ntpseg.training.same_data import check_same_data
from ntpseg.utils.files import is_litter, publish_folder, remove_folder, remove_litter, write_json, write_text
from ntpseg.utils.lock import LOCK, folder_lock
from ntpseg.utils.manifest import write_json_member, write_manifest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ntpseg.training.trainer import NTPSegTrainer


STOPPED = "stopped.json"  # of a run that a signal ended early; a start removes it


def train(
    config: RunConfig,
    *,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Check the data, make tokenizers and tokens, train, and save the bundle to ``output/model``.

    Args:
        config: see `load_config`.
        resume: continue from the last complete checkpoint of ``config.output`` (or from its tokens, if there is none);
            "auto": where a run has been begun there, and else start one.
        overwrite: remove the run that is there. A restart by torchrun (``--max-restarts``) goes on with the run that
            its launch began, whatever `resume` and `overwrite` say.
        progress: show progress bars.

    Returns:
        The run's directory: ``config.yaml``, ``model/``, ``checkpoint-N/``, ``logs/``, ``trainer_log.jsonl``,
        ``tokenizers/`` and ``cache/``.

    Raises:
        ntpseg.data.DataProblems: the data set is not in order; its text is the table of all problems.
        ntpseg.training.interruption.TrainingInterrupted: a scheduler asked for the machine by SIGTERM or SIGUSR1; a
            checkpoint was saved, ``stopped.json`` names signal and step, and `resume` goes on from there.
        ValueError: a setting cannot be used, or the output exists and neither `resume` nor `overwrite` is given.
    """
    if config.output is None:
        raise ValueError("output must be the directory of the run, got null")
    run = Path(config.output).expanduser()
    with ExitStack() as stack:
        if rank() == 0:
            if is_restart(run):
                resume, overwrite = True, False
            elif resume == "auto":
                resume = (run / "config.yaml").is_file() and not _is_unprepared(run)
            # A folder with a lock is ours, and whoever holds that is told first.
            if not (run / LOCK).is_file():
                _check_directory(run, resume=bool(resume), overwrite=overwrite)
            stack.enter_context(folder_lock(run, "output"))
            _prepare_directory(config, run, resume=bool(resume), overwrite=overwrite)
            mark(run)
        _train(config, run, progress=progress)
    return run


def _train(config: RunConfig, run: Path, *, progress: bool) -> None:
    """All ranks: from the directory that rank 0 has made, with the checkpoint to go on from if there is one."""
    try:
        keep_freed_memory()
        renew_store()
        args = training_arguments(config, run)
        check_attention(config)
        shown = progress and args.process_index == 0
        with args.main_process_first(local=False, desc="preparing the data"):
            prepared = prepare_run(config, run, progress=shown)
        checkpoint = last_checkpoint(run)
        if checkpoint is not None and _keep_global_batch(config, args, checkpoint):
            args = training_arguments(config, run)
        trainer = make_trainer(config, prepared, args, run, progress=shown)
        if args.process_index == 0:
            (run / STOPPED).unlink(missing_ok=True)
        limit = watch_seconds(config.training.get("hang_timeout"), args.world_size)
        watch = HangWatch(run, limit, args.process_index, args.world_size) if limit else None
        if watch is not None:
            trainer.add_callback(watch)
        try:
            with watch or nullcontext():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TrainingInterrupted as interruption:
            if args.process_index == 0:
                write_json(run / STOPPED, {"signal": interruption.name, "step": interruption.step})
            raise
        mirrored = bool(config.data.augment.get("flip"))
        _save(trainer, prepared, run, default_decoding(config), mirrored=mirrored, progress=shown)
    finally:
        end_processes()


def _keep_global_batch(config: RunConfig, args: TrainingArguments, checkpoint: Path) -> bool:
    """Fit batch and accumulation to another number of ranks than a checkpoint's; whether anything was changed."""
    saved, before = Parallelism.read(checkpoint), (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    readers = data_parallel_size(args.world_size, _sequence_parallel_size(config))
    fitted = fit_batch(saved, readers, *before)
    if fitted is None:
        return False
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    config.training.update(zip(names, fitted))
    if args.process_index == 0:
        changed = [f"{name} {old} -> {new}" for name, old, new in zip(names, before, fitted) if old != new]
        print(
            f"{saved.ranks} -> {args.world_size} ranks: {', '.join(changed)}, so that a step still takes "
            f"{saved.pairs} pairs",
            file=sys.stderr,
        )
    return True


def _sequence_parallel_size(config: RunConfig) -> int:
    return int(config.training.get("sequence_parallel_size") or 1)


def make_trainer(
    config: RunConfig, prepared: Prepared, args: TrainingArguments, run: Path, *, progress: bool = True
) -> NTPSegTrainer:
    """The trainer of a prepared run.

    Raises:
        ValueError: a setting of the model, the loss or the attention cannot be used.
    """
    from transformers import IntervalStrategy, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ntpseg.memory import HardTokenMemory
    from ntpseg.training.free_running import FreeRunningDice
    from ntpseg.training.hard_tokens import mapped_folder
    from ntpseg.training.trainer import NTPSegTrainer

    set_seed(config.seed)
    training, validation = prepared.training, prepared.validation
    data = make_datasets(config, prepared)
    if validation is None and args.load_best_model_at_end:
        raise ValueError("training.load_best_model_at_end must be false without a validation split, got true")
    if validation is None and args.eval_strategy != IntervalStrategy.NO:
        print("the data set has no validation split: there will be no evaluation while training", file=sys.stderr)
        args.eval_strategy = IntervalStrategy.NO
    memory = None
    if config.loss.hard_tokens and config.loss.het_weight:
        memory = HardTokenMemory(
            len(training),
            config.loss.hard_tokens,
            args.device,
            storage=config.loss.hard_token_storage,
            path=mapped_folder(config.loss, run, args.process_index),
            key=training.key,
        )
    trainer = NTPSegTrainer(
        make_model(config, prepared, run_attention(config, prepared, run, rank=args.process_index), args),
        args,
        train_dataset=data.training,
        eval_dataset=data.validation,
        data_collator=data.collator,
        memory=memory,
        hard_token_sync_steps=config.loss.hard_token_sync_steps,
        optimizer_options=config.optimizer,
        max_skipped_steps=config.max_skipped_steps,
        sequence_parallel_size=_sequence_parallel_size(config),
        budget=None
        if config.max_minutes is None
        else TimeBudget(config.max_minutes, args.get_warmup_steps(500), clock=config.clock),
        generation_metrics=None
        if validation is None
        else FreeRunningDice.from_prepared(prepared, default_decoding(config), image_tokens=prompt_has_codes(config)),
        callbacks=[JsonLog(run), RunTensorBoard(run)],
    )
    if config.training.get("torch_compile") == "auto":
        from ntpseg.training.compilation import CompileWherePays

        if not trainer.decodes_alone:
            print("torch.compile: not used, weights or sequences are shared out among ranks", file=sys.stderr)
        else:
            trainer.add_callback(CompileWherePays(trainer.model, budget=trainer.budget))
    if steps := config.training.get("profile_steps"):
        trainer.add_callback(ProfileSteps(run, steps, trainer.throughput.pause))
    for plain in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(plain)
    if progress:
        trainer.add_callback(TrainingProgress())
    return trainer


def _check_directory(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise a `ValueError` where `run` holds something that these options do not allow to be written over."""
    saved = run / "config.yaml"
    if resume:
        if not saved.is_file():
            raise ValueError(f"resume must name a run, got {run}, which holds no run (no config.yaml)")
    elif not run.exists() or (run.is_dir() and (not _content(run) or _is_unprepared(run))):
        pass
    elif not overwrite:
        raise ValueError(f"output must be new, got {str(run)!r}; give --resume to go on or --overwrite to start again")
    elif not saved.is_file():
        raise ValueError(f"output must be a run to be overwritten, got {str(run)!r}, which is not a run")


def _prepare_directory(config: RunConfig, run: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run's directory with this configuration; the caller holds its lock.

    Raises:
        ValueError: there is another run, it has other settings or data, or none of its checkpoints is whole.
    """
    _check_directory(run, resume=resume, overwrite=overwrite)
    remove_litter(run)
    if config.data.cache is None and (run / "cache").is_dir():
        remove_litter(run / "cache")
    saved = run / "config.yaml"
    if resume:
        check_same_run(config, saved)
        if (run / PREPARED).is_file():
            check_same_data(config, run)
        choose_checkpoint(run)
    else:
        # An attempt keeps the tokens that it has made, whose name says of what.
        _clear(run, keep=("cache", "config.yaml") if _is_unprepared(run) else ())
    write_text(saved, dump_config(config))


def _content(run: Path) -> list[Path]:
    """What is in a directory besides its lock and what killed writes left."""
    return [path for path in run.iterdir() if path.name != LOCK and not is_litter(path)]


def _is_unprepared(run: Path) -> bool:
    """Whether this is an attempt that ended before anything was prepared, because of bad data for instance."""
    return (run / "config.yaml").is_file() and not (run / PREPARED).is_file() and not checkpoints(run)


def _clear(run: Path, keep: Sequence[str]) -> None:
    """Remove what is in a run. Killed meanwhile, it is a run with fewer checkpoints, or an attempt at one."""

    def place(path: Path) -> int:
        if path.name.startswith(("checkpoint-", "model")):
            return 0
        return {PREPARED: 1, "config.yaml": 3}.get(path.name, 2)

    for path in sorted(_content(run), key=place):
        if path.name not in keep:
            remove_folder(path)


def _save(
    trainer: NTPSegTrainer,
    prepared: Prepared,
    run: Path,
    decoding: DecodingOptions,
    *,
    mirrored: bool = False,
    progress: bool = True,
) -> None:
    """Write the bundle under another name first, so that ``model/`` is always complete."""
    partial, final = run / "model.part", run / "model"
    model: Any = trainer.model
    bundle = Bundle(
        model=model, text=prepared.text, vision=prepared.vision, sequence=prepared.sequence, volume=prepared.volume
    )
    if trainer.is_world_process_zero():
        remove_folder(partial)
    trainer.wait_for_ranks()
    with trainer.averaged_weights():
        trainer.check_result()
        # Every rank takes part: ZeRO-3 gathers the weights here.
        trainer.save_model(str(partial))
        if not trainer.is_world_process_zero():
            return
        bundle.decoding = {"method": decoding.method, "passes": decoding.passes}
        (partial / "training_args.bin").unlink(missing_ok=True)
        bundle.save_tokenizers(partial)
        write_manifest(partial)
        publish_folder(partial, final)
        # Whatever ends this early, the model is there.
        if isinstance(prepared.validation, PixelSource) and trainer.decodes_alone:
            try:
                choice = choose_decoding(bundle, prepared.validation, decoding, mirrored=mirrored, progress=progress)
            except NonFiniteOutput as error:
                print(f"the decoding was not chosen on validation: {error}", file=sys.stderr)
                return
            write_json_member(final, DECODING, choice.options)
            write_json(run / "decoding_choice.json", choice.to_dict())
