"""The bot of the measured calls, on a disk that has no room for a byte of its calls.

Every file that roark opens for writing is refused as a full disk refuses it; the rest of the
process is as it was.
"""

import errno
import os
import runpy
import sys
from pathlib import Path

from roark import folder


def no_room(path: Path, flags: int) -> int:
    """Refuse to open a file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


folder.open_private = no_room
sys.argv[1:1] = [str(Path(__file__).with_name("host.py"))]
runpy.run_module("rehearsal.host.launch_bot", run_name="__main__")
