"""Python loads this at every start in the hosts of the campaign's lab, which have it in PYTHONPATH.

It costs a look for a file where nothing is to fail.
"""

import os

_DIRECTORY = os.environ.get("MIGRATE_FAULTS")

if _DIRECTORY is not None and os.path.exists(os.path.join(_DIRECTORY, "rules.json")):
    import injection  # type: ignore[import-not-found]  # beside this file, which is no package's

    injection.start(_DIRECTORY)
