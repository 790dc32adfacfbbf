"""Full supervised fine-tuning (SFT): every weight of the model learns to answer as the rows answer.

    python model_finetune/finetune_sft.py

Reads data_prepare/qwen3/sft_train.jsonl and sft_eval.jsonl, writes the finished model to trainer_output/sft_finetuned/ with its
checkpoints, loss_curve.png, training_log.jsonl, run.json and report.html. Stopped or killed, the same command goes on where it was.
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
# ---- Settings: edit here, or override on the command line (--learning-rate 1e-5) ----
MODEL = "model_download/Qwen3-0.6B"                 # base model: a folder, or the Hub id of one that was downloaded
TRAIN_FILE = "data_prepare/qwen3/sft_train.jsonl"   # conversations to learn from
EVAL_FILE = "data_prepare/qwen3/sft_eval.jsonl"     # conversations that are only measured on; "": none
OUTPUT_DIR = "trainer_output/sft_finetuned"         # the run: finished model, checkpoints, curve, log
EPOCHS = 3.0                # [> 0] passes over the training rows; a small model keeps gaining for two or three
HOURS = 0.0                 # [0 or more] end after so many hours, saving included, if EPOCHS take longer; 0: no limit
LEARNING_RATE = 2e-5        # [> 0, at most 0.1] peak rate for full fine-tuning; LoRA takes about ten times this
MAX_LENGTH = 1024           # [1, 2, ...] tokens per packed row; a longer example is set aside, never cut
JOIN_SINGLE = 0.0           # [0 to 1] share of single questions put behind one to three others: for a base that knows no conversations
# The rest seldom needs a change.
ROWS_PER_STEP = 4           # [1, 2, ...] packed rows of an optimizer step; how many go at once follows from the memory there is
MAX_STEPS = 0               # [0, 1, ...] stop after this many optimizer steps; 0 trains all EPOCHS
WARMUP = 0.03               # [0 to 0.99] share of the steps with a rising rate; a cosine over the run brings it down to zero
WEIGHT_DECAY = 0.0          # [0 or more] pull of the weights towards zero; a short fine-tuning needs none
TRAIN_EMBEDDINGS = True     # False leaves the embedding, which is the LM head too, as it is: 156 M of 596 M weights, a fifth less memory
EVALUATIONS = 10            # [1, 2, ...] measurements on EVAL_FILE, evenly over the run, beside the one before training
EVAL_ROWS = 0               # [0, 1, ...] conversations of each; 0: 50 to 500, so that all of them take 5 % of the time at most
KEEP = "best"               # [best | last] the finished model: best of all evaluations, or that of the last step
CHECKPOINT_MINUTES = 30.0   # [0 or more] write a checkpoint at least so often, beside every epoch's end; 0: at epochs' ends only
KEEP_CHECKPOINTS = 2        # [1, 2, ...] newest checkpoints to keep, about 7 GB each for 0.6 B parameters
TRACKER = "none"            # [none | tensorboard | wandb | swanlab | trackio | mlflow] a tool that gets the log as well
SEED = 0                    # [0, 1, ...] order of the rows
DEVICE = "auto"             # [auto | cuda | mps | cpu] auto: CUDA, else MPS, else CPU
PRECISION = "auto"          # [auto | bf16 | fp16 | fp32] auto: bf16, or fp16 on older NVIDIA GPUs, where the hardware has it; weights are float32 in any case
ESTIMATE = False            # print what the run needs in memory, disk and steps, and stop
SHOW_EXAMPLE = 0            # [0, 1, ...] print this many examples as the trainer sees them, and stop
FRESH = False               # start over; an earlier run in OUTPUT_DIR is moved aside
# ----
# fmt: on


def main(argv=None):
    settings = read_settings(globals(), argv)
    for path in filter(None, (settings.TRAIN_FILE, settings.EVAL_FILE)):
        require_file(path, "python data_prepare/convert_to_qwen3_format.py", ["messages"])
    settings.MODEL = folder.check_model(settings.MODEL, whole=True)
    settings.show()
    folder.quiet_offline()

    import torch

    from utils.device import pick_device
    from utils.model.prove import prove
    from utils.model.qwen3_train import prepare_packed
    from utils.training.loop import train
    from utils.training.losses import sft_loss
    from utils.training.plan import plan_run
    from utils.training.rows import load_conversations, show_examples
    from utils.training.run import Run

    # 1. The folder of the run, which goes on where it stopped
    device = prove(pick_device(settings.DEVICE, settings.PRECISION))
    run = Run(settings, device, "SFT")
    if run.finished:
        return

    # 2. The rows: token ids as chat will show them, packed
    tokenizer = folder.load_tokenizer(settings.MODEL)
    load = functools.partial(load_conversations, tokenizer=tokenizer, max_length=settings.MAX_LENGTH)
    train_rows = load(settings.TRAIN_FILE, join=settings.JOIN_SINGLE)
    if settings.SHOW_EXAMPLE:
        return show_examples(train_rows.rows, tokenizer, settings.SHOW_EXAMPLE)

    # 3. The model, with float32 master weights
    model = prepare_packed(folder.load_model(settings.MODEL, torch.float32))
    model.get_input_embeddings().requires_grad_(settings.TRAIN_EMBEDDINGS)
    folder.remember_mode(model, tokenizer, train_rows.thinking)

    # 4. Plan: memory, disk, steps and hours, refused with the numbers if it does not fit
    plan = plan_run(run, model, train_rows, lambda count: load(settings.EVAL_FILE, count=count))
    if settings.ESTIMATE:
        return

    # 5. Train, and save the model; the loss curve lies beside it
    results = train(run, model, sft_loss, plan, lambda place: folder.save_model(model, tokenizer, place))
    run.finish(lambda place: folder.save_model(model, tokenizer, place), results)


if __name__ == "__main__":
    sys.exit(run(main))
