"""An output folder of one's own: nothing is overwritten unasked, one process at a time."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout  # which torch brings

from rankwise.errors import OutputExists, SaveError
from rankwise.io import FILE

LOCK = ".rankwise.lock"
OURS = ("checkpoint-*", FILE, "run.yaml", "metrics.jsonl", "loss.png")


@contextmanager
def claimed(out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Hold a folder while writing it. The system frees a dead process's claim.

    Args:
        out: the folder; made if it is not there.
        resume: accept what is there and go on from it.
        overwrite: remove a former run's files first; other files stay.

    Yields:
        The folder.

    Raises:
        OutputExists: it is not empty, or another process is writing it.
        SaveError: it cannot be made.
    """
    path, made = Path(out), not Path(out).exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"The output folder {path} cannot be made ({error}).") from error
    try:
        with FileLock(path / LOCK, timeout=0):
            try:
                _clear(path, resume, overwrite)
                yield path
            finally:
                (path / LOCK).unlink()
                if made and not any(path.iterdir()):
                    path.rmdir()
    except Timeout as error:
        text = f"One process writes a folder at a time; another one is writing {path}. Wait, or give another --out."
        raise OutputExists(text) from error


def _clear(path: Path, resume: bool, overwrite: bool) -> None:
    there = sorted(file.name for file in path.iterdir() if file.name != LOCK)
    if there and not (resume or overwrite):
        remedy = ", or --resume the run in it" if "run.yaml" in there else ""
        raise OutputExists(
            f"Nothing is overwritten unasked; {path} holds {', '.join(there[:3])}{' ...' if there[3:] else ''}. "
            f"Give another --out, or --overwrite it{remedy}."
        )
    for file in [file for pattern in OURS for file in path.glob(pattern)] if not resume else []:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
