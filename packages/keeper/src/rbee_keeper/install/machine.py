"""The machine that is installed on: looks whether a step is done, does it, and tells what it did."""

import errno
import grp
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_keeper.install.steps import SYSUSERS, USER, USER_COMMENT, File, Folder, Link, Step

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
        """Give where a path of that machine lies now.

        Raises:
            RbeeError: it lies outside of an image's folder, behind a link that only the image may follow.
        """
        place = self._root / path.lstrip("/")
        if not place.parent.resolve().is_relative_to(self._root):
            raise RbeeError(
                f"{path} lies behind a link that leads out of {self._root}, onto this machine. "
                "Make the link in the image a relative one.",
                code="leads_out",
            )
        return place

    def has(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def read(self, path: str) -> str | None:
        """Give a file's text; None where there is none.

        Raises:
            RbeeError: it cannot be read.
        """
        try:
            return self.at(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            if isinstance(exc, OSError):
                raise _cannot("read", path, exc, code="unreadable") from exc
            raise RbeeError(f"{path} is not text. Mend or remove it.", code="unreadable") from exc

    def is_active(self, unit: str) -> bool:
        """Whether systemd runs the unit, or is about to."""
        return self._state(unit) not in ("inactive", "failed", "")

    def _state(self, unit: str) -> str:
        if not self.is_live:
            return ""
        return _run("systemctl", "show", "--property=ActiveState", "--value", unit).stdout.strip()

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
        except KeyError as exc:
            raise RbeeError(
                f"{step.path} needs a user and a group {USER}, which this machine lacks. "
                f"Make them: systemd-sysusers {SYSUSERS}",
                code="no_user",
            ) from exc

    def make_user(self, sysusers: str) -> None:
        """Make the system user, as the file at `sysusers` says."""
        if self.is_live and not _has_user():
            self.command("systemd-sysusers", sysusers)

    def remove_user(self) -> None:
        """Remove the system user and its group; one of this name that was there before stays."""
        if not self.is_live or not _has_user():
            return
        if pwd.getpwnam(USER).pw_gecos == USER_COMMENT:
            self.command("userdel", USER)
        else:
            self._note(f"user {USER}", "kept", "it was not made by rbee install")

    def forget_failure(self, unit: str) -> None:
        """Have systemd forget that a unit has failed: it may be started again at once, and no trace stays."""
        if self._state(unit) == "failed":
            self.command("systemctl", "reset-failed", unit)

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

    def remove_empty(self, path: str) -> bool:
        """Remove a folder of which nothing is left; where somebody has put something else, it stays.

        Raises:
            RbeeError: it cannot be removed.
        """
        place = self.at(path)
        gone = {change.what for change in self.changes if change.verdict == "removed"}
        try:
            if not place.is_dir():
                return False
            others = sorted(entry.name for entry in place.iterdir() if f"{path}/{entry.name}" not in gone)
            if others:
                self._note(path, "kept", f"it holds files that are not rbee's: {', '.join(others)}")
                return False
            return self.remove(path)
        except OSError as exc:
            raise _cannot("remove", path, exc) from exc

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
            said = (answer.stderr or answer.stdout).strip() or f"status {answer.returncode}"
            raise RbeeError(f"`{' '.join(command)}` failed: {said}", code="command_failed")

    def _note(self, what: str, verdict: Verdict, why: str = "") -> None:
        change = Change(what=what, verdict=verdict, why=why)
        self.changes.append(change)
        self._tell(change)

    def _make_folder(self, step: Folder) -> bool:
        place = self.at(step.path)
        if place.is_dir():
            return not step.is_theirs and self._mend_rights(place, step)
        self._note(step.path, "created")
        if not self._is_dry:
            _make_parents(place)
            place.mkdir()
            self._own(place, step.mode, step.owner)
        return True

    def _make_file(self, step: File) -> bool:
        there = self.read(step.path)
        if there is not None and (there == step.text or step.is_theirs):
            if there != step.text:
                self._note(step.path, "kept", "it has settings of its own, which are never overwritten")
            return self._mend_rights(self.at(step.path), step)
        self._note(step.path, "created" if there is None else "changed")
        if self._is_dry:
            return True
        place = self.at(step.path)
        _make_parents(place)
        partial = place.with_name(f".{place.name}.new")
        partial.unlink(missing_ok=True)
        try:
            # Nobody else may read it before it has its owner and mode.
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(step.text.encode())
                file.flush()
                os.fsync(file.fileno())
            self._own(partial, step.mode, step.owner)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _mend_rights(self, place: Path, step: File | Folder) -> bool:
        """Give what is there already the owner and mode that it must have, but for what a link names."""
        if place.is_symlink():
            return False
        there = place.stat()
        has_owner = not self.is_live or (there.st_uid, there.st_gid) == _ids(step.owner)
        if has_owner and stat.S_IMODE(there.st_mode) == step.mode:
            return False
        self._note(step.path, "changed", f"to owner {step.owner} and mode {step.mode:04o}")
        if not self._is_dry:
            self._own(place, step.mode, step.owner)
        return True

    def _make_link(self, step: Link) -> bool:
        place = self.at(step.path)
        if place.is_symlink() and os.readlink(place) == step.target:
            return False
        self._note(step.path, "changed" if os.path.lexists(place) else "created")
        if not self._is_dry:
            _make_parents(place)
            place.unlink(missing_ok=True)
            place.symlink_to(step.target)
        return True

    def _own(self, place: Path, mode: int, owner: str) -> None:
        """Set owner and mode. An image may not have its users yet: its systemd-tmpfiles does it then."""
        if self.is_live:
            os.chown(place, *_ids(owner))
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


def _make_parents(place: Path) -> None:
    """Make the folders above a place, which everybody may enter, whatever the caller's umask is."""
    for folder in reversed([folder for folder in place.parents if not folder.exists()]):
        folder.mkdir()
        folder.chmod(0o755)


def _ids(owner: str) -> tuple[int, int]:
    """Give the numbers of a `user:group`.

    Raises:
        KeyError: there is no such user or group.
    """
    user, _, group = owner.partition(":")
    return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid


def _has_user() -> bool:
    try:
        _ids(f"{USER}:{USER}")
    except KeyError:
        return False
    return True


def _cannot(verb: str, path: str, exc: OSError, code: str = "cannot_write") -> RbeeError:
    is_forbidden = exc.errno in (errno.EACCES, errno.EPERM)
    remedy = "Run it as root." if is_forbidden else "Mend that and run it again: what is done stays done."
    return RbeeError(f"cannot {verb} {path}: {exc.strerror or exc}. {remedy}", code=code)
