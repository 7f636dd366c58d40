"""Tests of the commit that the package reports: in a checkout, in built distributions, and in a Ray job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from spartan_ray import __version__, origin
from spartan_ray.run.record import environment

ROOT = Path(__file__).parent.parent
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [*GIT, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def repository(folder: Path) -> str:
    """Make a git repository of a folder and commit all its files. Return the commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all of it")
    return git(folder, "rev-parse", "HEAD")


def said(*path: Path) -> tuple[str | None, str]:
    """Return the commit and digest that the package reports to a Python that searches only these folders."""
    program = "from spartan_ray import origin; print(origin.commit(), origin.sources())"
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-S", "-B", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, env=given, cwd=path[0], check=True)
    commit, sources = ended.stdout.split()
    return (None if commit == "None" else commit), sources


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package in a separate git repository."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "spartan_ray", folder / "spartan_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    repository(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of the checkout, unpacked as pip does."""
    return unpacked(checkout, tmp_path_factory.mktemp("wheel"))


def unpacked(source: Path, folder: Path) -> Path:
    built = folder / "built"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built)]
    subprocess.run([*command, str(source)], check=True)
    (file,) = built.iterdir()
    assert file.name.startswith(f"spartan_ray-{__version__}-")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def job(checkout: Path, folder: Path) -> Path:
    """Copy a checkout as Ray copies a working directory, without git's files. Return the copy."""
    return Path(shutil.copytree(checkout, folder / "job", ignore=shutil.ignore_patterns(".git", "__pycache__")))


def test_a_checkout_is_of_its_commit_unless_the_package_was_changed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert said(checkout) == (head, origin.sources())
    (checkout / "README.md").write_text("other words")
    assert said(checkout)[0] == head
    source = checkout / "spartan_ray" / "noise" / "contract.py"
    text = source.read_text()
    source.write_text(text + "\n# changed\n")
    assert said(checkout)[0] == f"{head}-dirty"
    assert said(checkout)[1] != origin.sources()
    source.write_text(text)
    assert said(checkout)[0] == head


def test_a_wheel_is_of_the_commit_that_it_was_built_from(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    assert git(checkout, "status", "--porcelain", "--ignored", "--", "spartan_ray") == ""  # the build left nothing
    environment = tmp_path / "environment"
    shutil.copytree(wheel, environment / "site")
    (tmp_path / ".gitignore").write_text("environment\n")
    repository(tmp_path)  # git around the environment does not matter
    head = git(checkout, "rev-parse", "HEAD")
    assert said(environment / "site") == (head, origin.sources())
    with open(environment / "site" / "spartan_ray" / "noise" / "contract.py", "a") as source:
        source.write("# changed\n")
    assert said(environment / "site")[0] is None


def test_a_source_distribution_hands_the_commit_on(checkout: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkout, tmp_path / "source")
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"spartan_ray-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert said(unpacked(tree, tmp_path)) == said(checkout)


def test_a_job_is_of_the_commit_of_the_installed_package_if_the_sources_are_the_same(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    folder = job(checkout, tmp_path)
    assert said(folder) == (None, origin.sources())
    assert said(folder, wheel) == (head, origin.sources())
    # Write the metadata that `pip install --editable` leaves in an environment.
    about = tmp_path / "editable" / f"spartan_ray-{__version__}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: spartan-ray\nVersion: {__version__}\n")
    (about / "direct_url.json").write_text(f'{{"dir_info": {{"editable": true}}, "url": "{checkout.as_uri()}"}}')
    assert said(folder, about.parent)[0] == head
    with open(folder / "spartan_ray" / "noise" / "contract.py", "a") as source:
        source.write("# changed\n")
    assert said(folder, wheel)[0] is None
    assert said(folder, about.parent)[0] is None


def test_the_environment_of_a_run_names_version_commit_and_sources() -> None:
    known = environment()
    assert known["versions"]["spartan-ray"] == __version__
    assert (known["git_commit"], known["sources"]) == (origin.commit(), origin.sources())
