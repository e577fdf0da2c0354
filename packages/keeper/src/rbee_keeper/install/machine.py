"""The machine that is installed on: looks whether a step is done, does it, and tells what it did."""

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_keeper.install.steps import USER, File, Folder, Link, Step

Verdict: TypeAlias = Literal["created", "changed", "kept", "removed", "ran"]


class Change(Struct, frozen=True, kw_only=True):
    """One thing that was done, or in a dry run would be, or deliberately was not."""

    what: str
    verdict: Verdict
    why: str = ""


class Machine:
    """A file system and, where it is this machine's own, its users and services.

    Args:
        root: where its file system begins: `/`, or a folder that becomes an image.
        is_dry: nothing is done, only told.
        tell: is called with each change.
    """

    def __init__(self, root: Path, *, is_dry: bool, tell: Callable[[Change], None]) -> None:
        self._root = root
        self._is_dry = is_dry
        self._tell = tell
        self.is_live = root == Path("/")
        self.changes: list[Change] = []

    # --- looking ---------------------------------------------------------------------------------------

    def at(self, path: str) -> Path:
        """Give where a path of that machine lies now."""
        return self._root / path.lstrip("/")

    def has(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def read(self, path: str) -> str | None:
        """Give a file's text; None where there is none.

        Raises:
            RbeeError: it cannot be read.
        """
        try:
            return self.at(path).read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "it is not text"
            raise RbeeError(f"{path} cannot be read: {why}. Run it as root.", code="unreadable") from exc

    def is_active(self, unit: str) -> bool:
        """Whether systemd runs the unit, or is about to."""
        if not self.is_live:
            return False
        state = _run("systemctl", "show", "--property=ActiveState", "--value", unit).stdout.strip()
        return state not in ("inactive", "failed", "")

    # --- doing -----------------------------------------------------------------------------------------

    def make(self, step: Step) -> bool:
        """Make a step true; tell whether something was changed.

        Raises:
            RbeeError: it cannot be.
        """
        try:
            match step:
                case Folder():
                    return self._make_folder(step)
                case File():
                    return self._make_file(step)
                case Link():
                    return self._make_link(step)
        except OSError as exc:
            raise _cannot("make", step.path, exc) from exc

    def make_user(self, sysusers: str) -> None:
        """Make the system user, as the file at `sysusers` says."""
        if self.is_live and not _has_user():
            self.command("systemd-sysusers", sysusers)

    def remove_user(self) -> None:
        """Remove the system user and its group."""
        if self.is_live and _has_user():
            self.command("userdel", USER)

    def remove(self, path: str) -> bool:
        """Remove a file, a link or a whole folder; tell whether there was one.

        Raises:
            RbeeError: it cannot be.
        """
        if not self.has(path):
            return False
        self._note(path, "removed")
        if self._is_dry:
            return True
        place = self.at(path)
        try:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()
        except OSError as exc:
            raise _cannot("remove", path, exc) from exc
        if (
            path.endswith(".conf")
            and place.parent.name.endswith(".service.d")
            and not any(place.parent.iterdir())
        ):
            place.parent.rmdir()
        return True

    def command(self, *command: str) -> None:
        """Run a command of a live machine.

        Raises:
            RbeeError: it fails; with what it said.
        """
        self._note(" ".join(command), "ran")
        if self._is_dry:
            return
        answer = _run(*command)
        if answer.returncode:
            said = (answer.stderr or answer.stdout).strip()
            raise RbeeError(f"`{' '.join(command)}` failed: {said}", code="command_failed")

    def _note(self, what: str, verdict: Verdict, why: str = "") -> None:
        change = Change(what=what, verdict=verdict, why=why)
        self.changes.append(change)
        self._tell(change)

    def _make_folder(self, step: Folder) -> bool:
        place = self.at(step.path)
        if place.is_dir():
            return False
        self._note(step.path, "created")
        if not self._is_dry:
            place.mkdir(parents=True)
            self._own(place, step.mode, step.owner)
        return True

    def _make_file(self, step: File) -> bool:
        there = self.read(step.path)
        if there == step.text:
            return False
        if there is not None and step.is_theirs:
            self._note(step.path, "kept", "it has settings of its own, which are never overwritten")
            return False
        self._note(step.path, "created" if there is None else "changed")
        if self._is_dry:
            return True
        place = self.at(step.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.new")
        partial.unlink(missing_ok=True)
        # Nobody else may read it before it has its owner and mode.
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(step.text)
        self._own(partial, step.mode, step.owner)
        partial.replace(place)
        return True

    def _make_link(self, step: Link) -> bool:
        place = self.at(step.path)
        if place.is_symlink() and os.readlink(place) == step.target:
            return False
        self._note(step.path, "changed" if os.path.lexists(place) else "created")
        if not self._is_dry:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(step.target)
        return True

    def _own(self, place: Path, mode: int, owner: str) -> None:
        """Set owner and mode. An image may not have its users yet: its systemd-tmpfiles does it then."""
        if self.is_live:
            user, _, group = owner.partition(":")
            os.chown(place, pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid)
        os.chmod(place, mode)


def journal_tail(unit: str, lines: int = 15) -> Sequence[str]:
    """Give the last lines that a unit has logged; none where they cannot be had."""
    try:
        answer = _run("journalctl", "--no-pager", "--output=cat", f"--lines={lines}", "--unit", unit)
    except RbeeError:
        return []
    return answer.stdout.splitlines()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise RbeeError(
            f"{command[0]} cannot be run: {exc.strerror}. Install it: it belongs to systemd, or to passwd.",
            code="command_missing",
        ) from exc


def _has_user() -> bool:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return False
    return True


def _cannot(verb: str, path: str, exc: OSError) -> RbeeError:
    return RbeeError(f"cannot {verb} {path}: {exc.strerror or exc}. Run it as root.", code="cannot_write")
