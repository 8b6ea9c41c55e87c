"""The layouts in which versions of PEFT store the factors of fused experts.

A fused expert has a weight of shape (out, in) in most models and (in, out) in a few, whose layer
has the attribute `is_transposed`. With a weight of shape (first, second), A is for

| PEFT | most models | `is_transposed` |
|---|---|---|
| before 0.19 | first | first |
| 0.19.0 | first | second |
| 0.19.1 or later | second | first |

(huggingface/peft pull requests 3083 and 3165). So 0.19.0 exchanges both sides of every model as
compared to later versions, and earlier versions those of most models. transformers before version
5 has no `is_transposed`: all its models are "most models". PEFT keeps the version of a config
that it loads, so a client that goes on with square experts of another layout shows the wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertLayout:
    """`versions` of PEFT with one layout, as messages name them, and the `peft_version` of new
    files in that layout; PEFT before 0.18 knows no such field.
    """

    versions: str
    stamp: str | None


BEFORE_0_19 = ExpertLayout("before 0.19", None)
ONLY_0_19_0 = ExpertLayout("0.19.0", "0.19.0")
#: The layout changed while PEFT called itself 0.18.2.dev0, and again at 0.19.1.dev0.
DEVELOPMENT = ExpertLayout("0.18.2.dev0 or 0.19.1.dev0", "0.19.1.dev0")
SINCE_0_19_1 = ExpertLayout("0.19.1 or later", "0.19.1")

#: From old to new.
LAYOUTS = (BEFORE_0_19, ONLY_0_19_0, DEVELOPMENT, SINCE_0_19_1)


def expert_layout(peft_version: object) -> ExpertLayout:
    """The layout by the `peft_version` of a config; a config without one is of PEFT before 0.18.

    >>> expert_layout("0.19.1").versions, expert_layout("0.18.1").versions
    ('0.19.1 or later', 'before 0.19')
    """
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(\.?dev)?", str(peft_version))
    if match is None:
        return BEFORE_0_19
    version = tuple(int(number or 0) for number in match.groups()[:3])
    if match[4] and (0, 18, 2) <= version <= (0, 19, 1):
        return DEVELOPMENT
    if version < (0, 19, 0):
        return BEFORE_0_19
    return ONLY_0_19_0 if version == (0, 19, 0) else SINCE_0_19_1
