"""Why a row is set aside."""


class Reject(Exception):
    """Why a row is set aside: `reason` is one of few, to count by, `detail` about this row, `row` what was read of it."""

    def __init__(self, reason: str, detail: str = "", row: object = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.row = reason, detail, row
