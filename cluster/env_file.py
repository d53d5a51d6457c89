"""A file of environment variables on the nodes, such as a mounted secret, that a job's processes read themselves.

Values given with a job are in its metadata and in a log of each node; only the file's path is.
"""

from __future__ import annotations

import os
import re

VARIABLE = "CLEARSEP_ENV_FILE"
"""Environment variable with the path of the file; ``clearsep submit --env-file`` sets it for a job."""
_LINE = re.compile(r"""(?:export\s+)?([A-Za-z_]\w*)=(?:'(.*)'|"(.*)"|(.*?))\s*""")


def load_env_file() -> None:
    """Read the ``NAME=VALUE`` lines of the file that :data:`VARIABLE` names, if it does, into the environment."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OSError(f"cannot read the environment file {path} ({cause}); mount it on every node") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if (found := _LINE.fullmatch(line.lstrip())) is None:
            raise ValueError(f"line {number} of {path} must be NAME=VALUE, got another form; correct the file")
        os.environ[found[1]] = next((value for value in found.groups()[1:] if value is not None), "")
