"""The run folder: everything that a run leaves behind, written so that a crash at any instant keeps the last good
state.

    RUN/config.toml  environment.json  metrics.jsonl  summary.json  report.html
    RUN/trajectories/step_000012.parquet  eval_LABEL.parquet
    RUN/checkpoints/step_000012/  best.json

Files and folders are written aside and renamed; ``metrics.jsonl`` alone is appended to, and a line that a crash tore is
dropped. One process at a time writes a run.
"""

from retool.store.checkpoints import seal
from retool.store.files import JsonlTracker, read_metrics, write_directory, write_file
from retool.store.folder import RunFolder, git_commit
from retool.store.trajectories import SCHEMA, read_groups, read_trajectories, write_rows, write_trajectories

__all__ = [
    "SCHEMA",
    "JsonlTracker",
    "RunFolder",
    "git_commit",
    "read_groups",
    "read_metrics",
    "read_trajectories",
    "seal",
    "write_directory",
    "write_file",
    "write_rows",
    "write_trajectories",
]
