"""DPO's reference: log-probabilities of all answers under the starting model, computed once and kept beside the run."""

import numpy

from utils.kept import read_kept, write_kept
from utils.model.logprobs import answer_logps
from utils.model.packing import PackedRows
from utils.text import progress
from utils.training.run import Run


def add_reference(run: Run, model, splits: dict[str, PackedRows]) -> None:
    """Give every item its "reference_chosen" and "reference_rejected", log-probabilities under `model` before training.

    The main process computes them and keeps them in reference_logps.json with the identity of the run (the sha256 of model and
    pairs, number format, ...): what was kept for another run, or has been changed, is computed again. No second model is
    ever in memory.
    """
    path, identity = run.folder / "reference_logps.json", run.record["identity"]
    with run.accelerator.main_process_first():
        kept = read_kept(path, identity)
        if kept is None:
            print("computing the reference log-probabilities, once", flush=True)
            kept = {
                name: answer_logps(model, rows, run.device, progress(f"reference, {name} pairs", "rows"))
                for name, rows in splits.items()
            }
            write_kept(path, identity, kept)
    for name, rows in splits.items():
        chosen, rejected = numpy.array(kept[name]).reshape(len(rows.items), 2).T
        rows.numbers.update(reference_chosen=chosen, reference_rejected=rejected)
