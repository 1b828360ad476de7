"""Globs of paths and addresses: `*`, `?`, `[…]`, and `**` for any number of folders.

split_glob     the fixed folder, and the pattern below it
glob_regex     what a pattern matches
glob_folders   where its matches can be
"""

from __future__ import annotations

import re
from collections.abc import Callable


def split_glob(path: str) -> tuple[str, str]:
    """A glob's fixed folder and its pattern; an address keeps its `?key=value` with the folder."""
    query, wild = "", r"[*?\[]"
    if "://" in path:
        path, mark, query = path.partition("?")
        query, wild = mark + query, r"[*\[]"
    found = re.search(wild, path)
    if not found:
        return path + query, ""
    slash = path.rfind("/", 0, found.start())
    return (path[:slash] or "/") + query, path[slash + 1 :]


def glob_regex(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within a folder; `**/` is any number of folders, also none."""
    regex = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+]|.", pattern):
        special = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
        if token in special:
            regex += special[token]
        elif token.startswith("[") and len(token) > 2:
            inner = token[1:-1].replace("\\", r"\\")
            regex += f"[^/{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
        else:
            regex += re.escape(token)
    return re.compile(regex, re.DOTALL)


def glob_folders(pattern: str) -> Callable[[str], bool]:
    """Whether what matches a pattern can be in or below a folder; its last part names files."""
    parts = pattern.split("/")
    matches = [glob_regex(part).fullmatch for part in parts[:-1]]

    def enters(folder: str) -> bool:
        names = folder.split("/")
        for name, part, match in zip(names, parts, matches, strict=False):
            if "**" in part:
                return True
            if not match(name):
                return False
        return len(names) < len(parts) or "**" in parts[-1]

    return enters
