"""What goes along with a run while it trains: its schedule, its pace, its log, its best weights, and when to save and to stop."""

import math

from transformers import TrainerCallback

from utils.training.best import BestWeights
from utils.training.callbacks import RunLog, SaveAndStop
from utils.training.forecast import RunSize
from utils.training.pace import Pace
from utils.training.run_folder import RunFolder
from utils.training.schedule import Schedule


class Course:
    """All that goes along with one run. `began`: when the process began, in monotonic seconds."""

    def __init__(self, settings, run: RunFolder, schedule: Schedule, size: RunSize, title: str, began: float):
        self.schedule, self.keep = schedule, settings.KEEP
        self.pace = Pace(
            size.checkpoint_seconds,
            size.saving_seconds,
            settings.CHECKPOINT_MINUTES,
            size.steps_per_epoch,
            began,
            run.seconds_given(settings.HOURS) if settings.HOURS else math.inf,
        )
        self.log = RunLog(run, schedule, self.pace, size.tokens_per_step, title)
        self.best = BestWeights(run, self.log, settings.KEEP)
        self.control = SaveAndStop(run, schedule, self.pace, self.log, size)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """In the order in which they have to be told: the log first, and what measures the time last."""
        return [self.log, self.best, self.control]

    def stop_requested(self) -> bool:
        return bool(self.control.requested)
