"""Whether something is there. Unlike with the functions of ``os.path``, an error is no "no".

Where a disk fails, or for want of memory, ``os.path.exists`` says that nothing is there, and ``os.path.realpath`` that
a link leads nowhere else: whoever acts on that overwrites files, or reads others in their place.
"""

from __future__ import annotations

import errno
import os
import stat

#: the errors by which a system says that there is nothing, or that nothing can have such a name
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})


def is_there(path: str | os.PathLike) -> bool:
    """Whether ``path`` leads to anything.

    Raises
    ------
    OSError
        If the system can't tell.

    Examples
    --------
    >>> is_there(os.curdir), is_there("no such file")
    (True, False)
    """
    return _mode(path) is not None


def is_folder(path: str | os.PathLike) -> bool:
    """Whether ``path`` leads to a folder. Raises as :func:`is_there` does.

    >>> is_folder(os.curdir), is_folder("team/adapter")
    (True, False)
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: str | os.PathLike) -> bool:
    """Whether ``path`` leads to a regular file. Raises as :func:`is_there` does.

    >>> is_file(os.curdir)
    False
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: str | os.PathLike) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # with a null byte in it
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
