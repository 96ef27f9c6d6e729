"""What two runs are compared by."""

import json

from cvjax.storage import checkpoint, metrics_log


def outcome(workdir) -> dict:
    """All of a finished run that does not depend on the clock.

    The digest is over every byte of the last state: parameters, optimiser, statistics,
    monitor. Rows are text, in which NaN equals NaN.
    """
    rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
    return {
        "digest": checkpoint.read_latest_info(workdir)["digest"],
        "rows": [
            json.dumps({key: row[key] for key in row if not key.startswith("time/")})
            for row in rows
        ],
        "summary": (workdir / "summary.json").read_text(),
    }
