"""What a person names, a path or a URL, to where it is."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora_cli.errors import UsageError
from fedlora_cli.remote import EXTRAS, Location, Remote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.S)

#: A repository on the Hugging Face hub in one state that nobody can change.
_PINNED = re.compile(r"(?:datasets/)?[^/@]+/[^/@]+@[0-9a-f]{40}(?:/[^@]*)?")

#: What no bucket is called, but for the long names of Amazon's access points.
_CREDENTIALS = re.compile(r"(?!arn:)[^/]*[:@]")

#: What pathlib leaves of a URL.
_MANGLED = re.compile(rf"({'|'.join(EXTRAS)}):/[^/]")


def location(named: str | Location) -> Location:
    """The place of that name: a URL begins with s3://, gs:// or hf://, all else is a path.

    Raises UsageError for other URLs, and for what would read something else tomorrow, or show a
    password: hf:// without a commit, and credentials or a query in a URL.

    >>> location("round-01").name, str(location("s3://bucket/round-01/"))
    ('round-01', 's3://bucket/round-01')
    """
    if isinstance(named, Remote):
        return Remote(named.protocol, named.key)
    if isinstance(named, Path) and _MANGLED.match(str(named)) and not named.exists():
        raise UsageError(named, "a URL, but not as a Path can hold it", "give the URL as text")
    url = None if isinstance(named, Path) else _URL.fullmatch(named)
    if url is None:
        return Path(named)
    protocol, key = url[1].lower(), url[2].strip("/")
    # Never the whole text: it may hold what nobody should see.
    where = f"{protocol}://{key[:200]}".partition("?")[0]
    if protocol not in EXTRAS:
        cure = "use a path, s3://, gs:// or hf://"
        raise UsageError(f"{protocol}://", "no storage that fedlora knows", cure)
    if protocol == "hf":
        if not _PINNED.fullmatch(key):
            cure = "write hf://org/repo@ and the 40 digits of a commit: others may change meanwhile"
            raise UsageError(where, "not pinned to a commit", cure)
    elif _CREDENTIALS.match(key):
        found = "credentials in an address, where everybody sees them"
        cure = "put them where the storage's own tools look for them"
        raise UsageError(f"{protocol}://", found, cure)
    if set("?#\0") & set(key):
        raise UsageError(where, "more than an address", "leave out ? and # and what follows")
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        cure = f"write {protocol}://bucket/folder"
        raise UsageError(where, "no address of a file or folder", cure)
    return Remote(protocol, key)


def optional(named: str | Location | None) -> Location | None:
    """The same for what need not be named."""
    return None if named is None else location(named)
