"""Object storage that remembers what it was asked, and misbehaves when told to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Store:
    """What fsspec's file system of S3 is to fedlora: etags, no folders but by their contents.

    `asked` are the questions, as method and key, and for ranges `key[start:end]`. `before` is
    called with each of them, and may raise or change the `objects`.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, key: None
    buckets: tuple[str, ...] = ("bucket",)

    def put(self, folder: Path, key: str) -> None:
        """Everything in a local folder, as somebody else uploads it."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{key}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    def names(self, key: str) -> list[str]:
        return sorted(
            one.removeprefix(f"{key}/") for one in self.objects if one.startswith(f"{key}/")
        )

    def ls(self, key: str, *, detail: bool) -> list[dict[str, Any]]:
        self._ask("ls", key)
        assert detail
        found = {}
        for one in self.objects:
            if one.startswith(f"{key}/"):
                name, deeper, _ = one.removeprefix(f"{key}/").partition("/")
                found[name] = self._folder(f"{key}/{name}") if deeper else self._file(one)
        if not found and key not in self.buckets:
            raise FileNotFoundError(key)
        return list(found.values())

    def info(self, key: str) -> dict[str, Any]:
        self._ask("info", key)
        if key in self.objects:
            return self._file(key)
        if key in self.buckets or any(one.startswith(f"{key}/") for one in self.objects):
            return self._folder(key)
        raise FileNotFoundError(key)

    def cat_file(self, key: str, *, start: int, end: int) -> bytes:
        self._ask("cat_file", f"{key}[{start}:{end}]")
        return self.objects[key][start:end]

    def put_file(self, path: str, key: str) -> None:
        self._ask("put_file", key)
        self.objects[key] = Path(path).read_bytes()

    def rm_file(self, key: str) -> None:
        self._ask("rm_file", key)
        self.objects.pop(key, None)

    def _ask(self, method: str, key: str) -> None:
        self.asked.append((method, key))
        self.before(method, key)

    def _folder(self, key: str) -> dict[str, Any]:
        return {"name": key, "size": 0, "type": "directory"}

    def _file(self, key: str) -> dict[str, Any]:
        content = self.objects[key]
        etag = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return {"name": key, "size": len(content), "type": "file", "ETag": etag}
