"""Where text and images come from: every module puts its sources into a registry of :mod:`.base`.

A new source is a new module here: it needs no entry anywhere else.
"""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
