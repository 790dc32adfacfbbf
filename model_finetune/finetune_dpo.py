"""Direct preference optimization (DPO; Rafailov et al. 2023, arXiv:2305.18290): the model learns which of two answers is better.

    python model_finetune/finetune_dpo.py

Starts from, and is held to, the SFT result. Writes the finished model with checkpoints, loss_curve.png, training_log.jsonl,
run.json, report.html and reference_logps.json (log-probabilities before training). Stopped or killed, the same command goes on.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.errors import run
from utils.files import require_file
from utils.model import folder
from utils.settings import read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--beta 0.2) ----
MODEL = "trainer_output/sft_finetuned"              # where the policy starts, and the reference it is held to
TRAIN_FILE = "data_prepare/qwen3/dpo_train.jsonl"   # preference pairs to learn from
EVAL_FILE = "data_prepare/qwen3/dpo_eval.jsonl"     # pairs that are only measured on; "": none
OUTPUT_DIR = "trainer_output/dpo_finetuned"         # the run: finished model, checkpoints, curve, log
EPOCHS = 1.0                # [> 0] passes over the pairs; more than one or two overfits them
HOURS = 0.0                 # [0 or more] end after so many hours, saving included, if EPOCHS take longer; 0: no limit
LEARNING_RATE = 5e-7        # [> 0, at most 0.1] peak rate; DPO takes far less than SFT
MAX_LENGTH = 2048           # [1, 2, ...] tokens per packed row; a pair (both its answers) that is longer is set aside, never cut
BETA = 0.1                  # [> 0] how strongly the policy is held to the reference; smaller lets it go further
SFT_WEIGHT = 0.2            # [0 or more] weight of the chosen answer's own loss; without it DPO may lower chosen and rejected alike
LORA = False                # train adapters (RANK, ALPHA) instead of every weight; take a LEARNING_RATE of 5e-6 then
RANK = 16                   # [1, 2, ...] width of the adapters, with LORA
ALPHA = 32                  # [1, 2, ...] scale of the adapters, with LORA
# The rest seldom needs a change.
ROWS_PER_STEP = 4           # [1, 2, ...] packed rows of an optimizer step; how many go at once follows from the memory there is
MAX_STEPS = 0               # [0, 1, ...] stop after this many optimizer steps; 0 trains all EPOCHS
WARMUP = 0.1                # [0 to 0.99] share of the steps with a rising rate; a cosine over the run brings it down to zero
WEIGHT_DECAY = 0.0          # [0 or more] pull of the weights towards zero
EVALUATIONS = 10            # [1, 2, ...] measurements on EVAL_FILE, evenly over the run, beside the one before training
EVAL_ROWS = 0               # [0, 1, ...] pairs of each; 0: 50 to 500, so that all of them take 5 % of the time at most
KEEP = "best"               # [best | last] the finished model: best of all evaluations, or that of the last step
CHECKPOINT_MINUTES = 30.0   # [0 or more] write a checkpoint at least so often, beside every epoch's end; 0: at epochs' ends only
KEEP_CHECKPOINTS = 2        # [1, 2, ...] newest checkpoints to keep, about 7 GB each for 0.6 B parameters
TRACKER = "none"            # [none | tensorboard | wandb | swanlab | trackio | mlflow] a tool that gets the log as well
SEED = 0                    # [0, 1, ...] order of the rows, and the adapters' initial weights
DEVICE = "auto"             # [auto | cuda | mps | cpu] auto: CUDA, else MPS, else CPU
PRECISION = "auto"          # [auto | bf16 | fp16 | fp32] auto: bf16, or fp16 on older NVIDIA GPUs, where the hardware has it; weights are float32 in any case
ESTIMATE = False            # print what the run needs in memory, disk and steps, and stop
SHOW_EXAMPLE = 0            # [0, 1, ...] print this many pairs as the trainer sees them, and stop
FRESH = False               # start over; an earlier run in OUTPUT_DIR is moved aside
# ----
# fmt: on


def main(argv=None):
    settings = read_settings(globals(), argv)
    for path in filter(None, (settings.TRAIN_FILE, settings.EVAL_FILE)):
        require_file(path, "python data_prepare/build_preference_pairs.py", ["prompt", "chosen", "rejected"])
    settings.MODEL = folder.check_model(settings.MODEL, whole=True)
    settings.show()
    folder.quiet_offline()

    import torch

    from utils.device import pick_device
    from utils.model.lora import add_lora
    from utils.model.prove import prove
    from utils.model.qwen3_train import prepare_packed
    from utils.training.loop import train
    from utils.training.losses import add_reference, dpo_batch_loss
    from utils.training.plan import plan_run
    from utils.training.rows import load_pairs, show_examples
    from utils.training.run import Run

    # 1. The folder of the run, which goes on where it stopped
    device = prove(pick_device(settings.DEVICE, settings.PRECISION), settings if settings.LORA else None)
    run = Run(settings, device, "DPO")
    if run.finished:
        return

    # 2. The rows: pairs, packed
    tokenizer = folder.load_tokenizer(settings.MODEL)
    load = functools.partial(load_pairs, tokenizer=tokenizer, max_length=settings.MAX_LENGTH)
    train_rows = load(settings.TRAIN_FILE)
    if settings.SHOW_EXAMPLE:
        return show_examples(train_rows.rows, tokenizer, settings.SHOW_EXAMPLE)

    # 3. The model: the policy, and as it starts the reference
    if settings.LORA:
        model = add_lora(prepare_packed(folder.load_for_lora(settings.MODEL, device.dtype)), settings)
    else:
        model = prepare_packed(folder.load_model(settings.MODEL, torch.float32))
    folder.remember_mode(model, tokenizer, train_rows.thinking)

    # 4. Plan: memory, disk, steps and hours, refused with the numbers if it does not fit
    plan = plan_run(run, model, train_rows, lambda count: load(settings.EVAL_FILE, count=count))
    if settings.ESTIMATE:
        return

    # 5. The log-probabilities of all answers under the reference, then train, and save the model; the loss curve lies beside it
    add_reference(run, model, {"train": plan.train_rows, "eval": plan.eval_rows})
    loss = functools.partial(dpo_batch_loss, beta=settings.BETA, sft_weight=settings.SFT_WEIGHT)
    results = train(run, model, loss, plan, lambda place: folder.save_model(model, tokenizer, place))
    save = folder.save_adapter_and_merged if settings.LORA else folder.save_model
    run.finish(lambda place: save(model, tokenizer, place), results)


if __name__ == "__main__":
    sys.exit(run(main))
