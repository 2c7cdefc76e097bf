"""A release could be made: sdist and wheel build, and what they hold works without the checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import engram_hf


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# A test file that looks for the repository around itself.
NEEDS_REPOSITORY = re.compile(r"\.parent\.parent|\.parents\[")


def ran(command: list, **options) -> str:
    """Output of a command that must end well, in an environment that has no path to the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTEST_"))}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        **{**options, "env": {**environment, **options.get("env", {})}},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist of what git tracks, and with a wheel that was built from the sdist alone."""
    folder = tmp_path_factory.mktemp("release")
    for name in ran(["git", "ls-files"], cwd=ROOT).splitlines():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "checkout" / name)
    dist = folder / "dist"
    # Both from this environment's setuptools: nothing is downloaded.
    ran([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, folder / "checkout"])
    return dist


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory) -> Path:
    """The interpreter of an environment that has the dependencies, and the package by the README's line only."""
    folder = tmp_path_factory.mktemp("installed")
    ran([sys.executable, "-m", "venv", folder / "env"])
    python = folder / "env" / "bin" / "python"
    # Old, and in the way of the one below; newer Pythons bring none.
    ran([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"])
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    # A path file adds the packages of this environment, but not what their own path files add: the checkout.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    line = re.search(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line is not None, "README.md has no line that begins with `pip install`."
    # Until there is a release, the wheel stands for the index. In the sdist, `pip install .` would do as well.
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(dist), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    (source,) = (folder / "source").iterdir()
    ran([python, "-m", *line.group().split(" #")[0].split()], cwd=source, env=offline)
    shutil.rmtree(folder / "source")
    return python


def test_the_wheel_holds_every_file_of_the_package_and_its_version(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tracked = ran(["git", "ls-files", "src"], cwd=ROOT).splitlines()
    assert {name.removeprefix("src/") for name in tracked} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"engram_hf", "engram_hf_command.py"}
    assert f"\nVersion: {engram_hf.__version__}\n" in metadata
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    assert f"\nRequires-Python: {settings['options']['python_requires']}\n" in metadata


def test_the_install_line_of_the_readme_gives_a_package_and_a_command(python, tmp_path):
    where = ran([python, "-c", "import engram_hf; print(engram_hf.__file__)"], cwd=tmp_path).strip()
    assert Path(where).is_relative_to(python.parents[1]) and ROOT not in Path(where).parents
    assert "inspect" in ran([python.with_name("engram-hf"), "--help"], cwd=tmp_path)


def test_what_is_installed_passes_the_tests_that_need_no_repository(python, dist, tmp_path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    left_out = [path for path in (source / "tests").rglob("test_*.py") if NEEDS_REPOSITORY.search(path.read_text())]
    for path in left_out:
        path.unlink()
    # The sources are gone, so that only what is installed can be imported.
    shutil.rmtree(source / "src")
    told = ran([python, "-m", "pytest", "-m", "not slow", "-n", "2", "-p", "no:cacheprovider"], cwd=source)
    assert int(re.search(r"(\d+) passed", told).group(1)) > 300
