"""The control groups that a process lives in, and the limits that they set, for cgroup v1, v2 and both mounted at once.

A limit anywhere between a process' own group and the top of the hierarchy binds it, so all of them are read. Inside a
container often only a part of the hierarchy is mounted; then the part that can be seen counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tightfit.budget.mounts import Mount, mounts


@dataclass(frozen=True)
class Group:
    """One control group: the version of its interface (1 or 2), and its folder."""

    version: int
    folder: Path

    def read(self, name: str) -> str | None:
        """The text of one of its files, or None if it has no such file, as the top of a hierarchy often does not."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return None

    def number(self, name: str) -> int | None:
        """The number in one of its files; None if there is none, or if it is ``max`` (no limit)."""
        text = self.read(name)
        return int(text) if text is not None and text.lstrip("-").isdigit() else None

    def table(self, name: str) -> dict[str, int]:
        """The ``key value`` lines of one of its files."""
        pairs = (line.split() for line in (self.read(name) or "").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def groups(controller: str, root: Path = Path("/")) -> list[Group]:
    """The groups of this process that ``controller`` (``memory``, ``cpu``) may limit, its own first, then upward.

    ``root`` holds ``proc`` and ``sys``. The list is empty where there are no control groups.
    """
    found: list[Group] = []
    for version, path in _own_paths(controller, root):
        mounted = _mounts(version, controller, root)
        below = [(mount, _below(path, mount.top)) for mount in mounted]
        places = [(mount.point, mount.point / part) for mount, part in below if part is not None]
        # The path of a process in a container may be one that the container cannot see. What is mounted there is then
        # the container's own group.
        visible = [place for place in places if place[1].is_dir()] or [(mount.point, mount.point) for mount in mounted]
        for point, folder in visible[:1]:
            while True:
                found.append(Group(version, folder))
                if folder == point:
                    break
                folder = folder.parent
    return found


def _own_paths(controller: str, root: Path) -> list[tuple[int, PurePosixPath]]:
    """(version, path of this process' group) from lines such as ``4:memory:/a/b`` (v1) and ``0::/a/b`` (v2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            paths.append((2, PurePosixPath(path)))
        elif controller in controllers.split(","):
            paths.append((1, PurePosixPath(path)))
    return paths


def _mounts(version: int, controller: str, root: Path) -> list[Mount]:
    """Where the hierarchy that ``controller`` belongs to is mounted."""
    if version == 2:
        return [mount for mount in mounts(root) if mount.filesystem == "cgroup2"]
    return [mount for mount in mounts(root) if mount.filesystem == "cgroup" and controller in mount.options]


def _below(path: PurePosixPath, top: PurePosixPath) -> PurePosixPath | None:
    """``path`` relative to ``top``, or None if it is not inside."""
    if ".." in path.parts or not path.is_relative_to(top):
        return None
    return path.relative_to(top)
