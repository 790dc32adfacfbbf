"""What the three finetune scripts share: training arguments, the run itself, and the finished folder."""

import pickle
import sys
from typing import Any

import psutil
import torch
from transformers import TrainingArguments

from utils.device import Device
from utils.errors import NO_MEMORY, RunError
from utils.files import show_path
from utils.text import duration, format_bytes
from utils.training.best import best_of, verdict
from utils.training.checkpoints import list_checkpoints
from utils.training.page import write_page
from utils.training.plan import StepPlan
from utils.training.run_folder import RunFolder
from utils.training.trainer import PackedTrainer


def training_arguments(
    settings, device: Device, run: RunFolder, plan: StepPlan, steps: int
) -> TrainingArguments:
    """transformers' TrainingArguments from a script's settings, for a run of at most `steps` steps.

    Every step is logged (so that a resumed log has no seam) and a checkpoint ends every epoch. What else there is to save, when to
    evaluate and the learning rate follow the run's Schedule.
    """
    args = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=steps,
        per_device_train_batch_size=plan.rows_at_once,
        gradient_accumulation_steps=plan.passes,
        activation_checkpointing=plan.recompute,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=settings.LEARNING_RATE,
        weight_decay=settings.WEIGHT_DECAY,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=device.name == "cpu",
        bf16=device.bf16,
        seed=settings.SEED,
        data_seed=settings.SEED,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=settings.KEEP_CHECKPOINTS,
        report_to="none",
        disable_tqdm=True,
        # the number of trained tokens differs from row to row: on Apple GPUs each leaves buffers and a compiled graph behind
        torch_empty_cache_steps=10 if device.name == "mps" else None,
        remove_unused_columns=False,
        dataloader_pin_memory=device.name == "cuda",
        ddp_find_unused_parameters=False,
    )
    _take_one_gpu(args)
    return args


def _take_one_gpu(args: TrainingArguments) -> None:
    """One process computes on one GPU. transformers would split the batches among all with nn.DataParallel, without autocast."""
    if args.n_gpu > 1:  # n_gpu is known only once it has been asked for
        print(
            f"one of {args.n_gpu} GPUs is used; all of them: accelerate launch --multi_gpu --num_processes {args.n_gpu} "
            + " ".join(sys.argv)
        )
        args._n_gpu = 1


def train(trainer: PackedTrainer, run: RunFolder) -> dict[str, Any]:
    """Train from where `run` stands to the end, and put the weights to keep into the model; return the results for run.json.

    RunError, in one line, where memory runs out; KeyboardInterrupt after Ctrl-C, once the checkpoint is written.
    """
    course = trainer.course
    run.begin()
    if run.checkpoint:
        print(f"going on from {show_path(run.checkpoint)}")
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except pickle.UnpicklingError:
        raise RunError(
            f"{show_path(run.checkpoint)} holds more than numbers, and code from files is not run here; delete it, and "
            "the same command goes on from the checkpoint before"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in NO_MEMORY):
            raise
        checkpoints = list_checkpoints(run.folder)
        kept = f"{show_path(checkpoints[-1])} is kept" if checkpoints else "no checkpoint was written yet"
        raise RunError(
            f"not enough memory after step {trainer.state.global_step}; lower MAX_LENGTH, or close other programs; {kept}"
        ) from None
    finally:
        course.log.draw()
    if course.control.agree_to_stop(trainer.args):
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step}, checkpoint written; the same command goes on"
        )
    return _results(trainer, course)


def _results(trainer, course):
    evaluations = course.log.evaluations()
    kept = best_of(evaluations) if course.keep == "best" else evaluations[-1]
    if kept is not evaluations[-1] and trainer.args.should_save:  # only the main process writes the model
        if not course.best.load(trainer.model, kept["step"]):
            kept = evaluations[-1]
    start = course.log.before()
    results = {
        "steps": trainer.state.global_step,
        "kept_step": kept["step"],
        "best_step": best_of(evaluations)["step"],
        "tokens": round(course.log.tokens_per_step * trainer.state.global_step),
        "train_loss": course.log.losses()[-1],
        "eval_loss_before": start["eval_loss"],
        "eval_loss": kept["eval_loss"],
        "eval_loss_last": evaluations[-1]["eval_loss"],
        "seconds": round(course.pace.elapsed(), 1),
        "tokens_per_second": round(course.log.tokens_per_second(trainer.state), 1),
        "peak_memory_bytes": peak_memory(trainer.args.device),
    }
    for line in verdict(start, evaluations, course.log.losses(), kept["step"]):
        print(line)
    return results


def report(run: RunFolder, results: dict[str, Any], seconds: float) -> None:
    """Print where the finished run lies and what to do next."""
    print(
        f"finished in {duration(seconds)}: held-out loss {results['eval_loss_before']:.4f} -> {results['eval_loss']:.4f}, "
        f"{results['tokens_per_second']:,.0f} tokens/s, peak memory {format_bytes(results['peak_memory_bytes'])}"
    )
    place = show_path(run.folder)
    if run.main:
        write_page(run.folder)
    print(
        f"model: {place}   loss curve: {place}/loss_curve.png   report: {place}/report.html\nchat with it: python model_download/load_local_model.py {place}"
    )


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU where one computes, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not there on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # bytes on macOS, KiB elsewhere
