"""DPO's reference: log-probabilities of all answers under the starting model."""

from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.model.logprobs import answer_logps
from utils.progress import progress


def add_reference(model, splits, args, device, run):
    """Give every item its "reference_chosen" and "reference_rejected", log-probabilities under `model` before training.

    They are computed once, by the main process, and kept in reference_logps.json; a resumed run reads them back (its
    identity holds the fingerprints of model and pairs, so they are the same), and no second model is ever in memory.
    `splits`: {name: PackedRows}.
    """
    path = run.folder / "reference_logps.json"
    with args.main_process_first(local=False, desc="reference log-probabilities"):
        if not path.is_file():
            print("computing the reference log-probabilities, once", flush=True)
            write_json(
                path,
                {
                    name: answer_logps(model, rows, device, progress(f"reference, {name} pairs", "rows"))
                    for name, rows in splits.items()
                },
            )
        kept = read_json(path)
    for name, rows in splits.items():
        if len(kept[name]) != len(rows.items):
            raise UserError(f"{show_path(path)} does not fit the pairs; start over with --fresh")
        for item, (chosen, rejected) in zip(rows.items, kept[name]):
            item.update(reference_chosen=chosen, reference_rejected=rejected)
