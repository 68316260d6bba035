"""PyInstaller's hook for edgeloop; found through the entry point `pyinstaller40`."""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    return [str(Path(__file__).parent)]
