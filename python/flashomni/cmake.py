"""Where the C++ library lies that came with the package."""

from __future__ import annotations

from pathlib import Path


def cmake_prefix_path() -> str:
    """What CMake's find_package(flashomni) needs as CMAKE_PREFIX_PATH: headers, library, CMake package.

    RuntimeError where the package runs from a checkout: there, `cmake --install` makes such a folder.
    """
    import flashomni

    folders = [Path(folder) / "csrc" for folder in flashomni.__path__]
    for folder in folders:
        if (folder / "lib/cmake/flashomni/flashomniConfig.cmake").is_file():
            return str(folder)
    raise RuntimeError(
        f"the C++ library is not in {' nor in '.join(map(str, folders))}: install the package with "
        "`pip install .`, or build a checkout with CMake and install that with `cmake --install`"
    )
