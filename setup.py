"""Writes the git commit into what is built, since a wheel is used far from git; pyproject.toml says all the rest."""

import runpy
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

origin = runpy.run_path("spartan_ray/origin.py")


def record_commit(package: Path) -> None:
    if commit := origin["commit"]():
        (package / origin["RECORD"]).write_text(f"{commit} {origin['sources']()}\n")


class Wheel(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            record_commit(Path(self.build_lib) / "spartan_ray")


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: Any) -> None:
        super().make_release_tree(base_dir, files)
        record_commit(Path(base_dir) / "spartan_ray")


setup(cmdclass={"build_py": Wheel, "sdist": SourceDistribution})
