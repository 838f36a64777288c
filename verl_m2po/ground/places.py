"""Folders and files that a command writes, asked about before its work rather than after it."""

import os
from pathlib import Path


def why_no_folder(path: Path) -> str | None:
    """Why nothing could be written into the folder `path`, with what to do; None where it can. Nothing is made.

    Args:
        path: A folder, or where one would be made with its parents.
    """
    place = path.expanduser().absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        below = "" if place == path.expanduser().absolute() else f" lies below {place}, which"
        return f"{path}{below or ','} is no folder: choose another"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{path} cannot be written to ({place} is not writable): choose another"
    return None
