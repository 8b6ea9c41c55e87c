"""Paths and URLs as a user types them, checked."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora_cli.errors import UsageError
from fedlora_cli.remote import EXTRAS, Location, Remote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.S)

#: A repository on the Hugging Face hub, pinned to a commit.
_PINNED = re.compile(r"(?:datasets/)?[^/@]+/[^/@]+@[0-9a-f]{40}(?:/[^@]*)?")

#: User names and passwords in an address. Only Amazon's access points have a colon in their names.
_CREDENTIALS = re.compile(r"(?!arn:)[^/]*[:@]")

#: A URL after pathlib has joined its slashes.
_MANGLED = re.compile(rf"({'|'.join(EXTRAS)}):/[^/]")


def location(named: str | Location) -> Location:
    """The path or remote place of that name. URLs begin with s3://, gs:// or hf://.

    Raises UsageError for other URLs, for hf:// without a commit (its content may change), and for
    credentials or a query in a URL.

    >>> location("round-01").name, str(location("s3://bucket/round-01/"))
    ('round-01', 's3://bucket/round-01')
    """
    if isinstance(named, Remote):
        return named.unlisted
    if isinstance(named, Path) and _MANGLED.match(str(named)) and not named.exists():
        raise UsageError(named, "a URL, but not as a Path can hold it", "give the URL as text")
    url = None if isinstance(named, Path) else _URL.fullmatch(named)
    if url is None:
        return Path(named)
    protocol, key = url[1].lower(), url[2].strip("/")
    # Errors never show the whole URL: it may hold a password.
    where = f"{protocol}://{key[:200]}".partition("?")[0]
    if protocol not in EXTRAS:
        cure = "use a path, s3://, gs:// or hf://"
        raise UsageError(f"{protocol}://", "an unknown kind of storage", cure)
    if protocol == "hf":
        if not _PINNED.fullmatch(key):
            cure = "write hf://org/repo@COMMIT with all 40 digits: branches and tags may change"
            raise UsageError(where, "not pinned to a commit", cure)
    elif _CREDENTIALS.match(key):
        found = "credentials in a URL, which shows them in logs and process lists"
        cure = "set them in the environment, or in the storage tool's own files"
        raise UsageError(f"{protocol}://", found, cure)
    if set("?#\0") & set(key):
        raise UsageError(
            where, "a query in the address", "leave out ? and # and the text after them"
        )
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        cure = f"write {protocol}://bucket/folder"
        raise UsageError(where, "no address of a file or folder", cure)
    return Remote(protocol, key)


def optional(named: str | Location | None) -> Location | None:
    """`location`, or None for None."""
    return None if named is None else location(named)
