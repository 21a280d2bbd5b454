"""An output folder of one's own: nothing is overwritten unasked, one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankwise.errors import OutputExists, SaveError

LOCK = ".rankwise.lock"
OURS = ("checkpoint-*", "adapter.safetensors", "run.yaml", "metrics.jsonl", "loss.png")


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
    path = Path(out)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SaveError(f"The output folder {path} cannot be written ({error}).") from error
    held = False
    try:
        held = _lock(handle) and (path / LOCK).exists() and _same(handle, path / LOCK)
        if not held:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise OutputExists(
                f"One process writes a folder at a time; {path} is held by process {holder}. Wait "
                f"for it, or give another --out."
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        there = sorted(p.name for p in path.iterdir() if p.name != LOCK)
        if there and not (resume or overwrite):
            raise OutputExists(
                f"Nothing is overwritten unasked; {path} holds {', '.join(there[:3])}"
                f"{' ...' if len(there) > 3 else ''}. Give another --out, or --overwrite it"
                f"{', or --resume the run in it' if 'run.yaml' in there else ''}."
            )
        for name in OURS if overwrite and not resume else ():
            for inside in path.glob(name):
                shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        yield path
    finally:
        if held:
            (path / LOCK).unlink(missing_ok=True)
        os.close(handle)
        if held and made and path.exists() and not any(path.iterdir()):
            path.rmdir()


def _same(handle: int, path: Path) -> bool:
    return os.fstat(handle).st_ino == path.stat().st_ino


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
