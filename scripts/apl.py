"""What the WebUI loads. The code is in `a1111_extension`; the repository is loaded as one package, once a process."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from modules import paths_internal, scripts, shared

NAME = "apl_anonymization_prompt"
ROOT = Path(scripts.basedir())  # known only while this file is being loaded


def _policy_wanted() -> bool:
    given = getattr(shared.cmd_opts, "apl_policy", None)
    beside = Path(paths_internal.script_path) / "apl_policy.json"
    return given is not None or "APL_POLICY" in os.environ or beside.exists()


try:
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    Base = importlib.import_module(f"{NAME}.a1111_extension.register").register()
except Exception as error:
    if _policy_wanted():  # a damaged copy; the host would go on, without the protection that was ordered
        raise SystemExit(78) from error
    raise


class Script(Base, scripts.Script):
    """The accordion; the host wants its class in this file."""

    sorting_priority = -1
