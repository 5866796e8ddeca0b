"""What is installed, what may know whom, how large a file may be, which names are public."""

import ast
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import granalign_hf
from granalign_hf.examples import PHOTOGRAPHS, SCENES

ROOT = Path(granalign_hf.__file__).resolve().parents[1]
FOLDERS = ("granalign_hf", "modeling", "training", "model_cards")
MAX_LINES = 400
PUBLIC_NAMES = [
    "GranAlignConfig",
    "GranAlignImageOutput",
    "GranAlignModel",
    "GranAlignOutput",
    "GranAlignPreTrainedModel",
    "GranAlignProcessor",
    "GranAlignTextOutput",
    "token_similarity",
]
# `modeling/` travels with every checkpoint: what it imports, a stranger's machine must have.
MODELING_MAY_IMPORT = {"torch", "transformers", "huggingface_hub.dataclasses", "PIL"}


pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="granalign_hf is not installed from a checkout"
)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import, also of those within functions; level 0 is absolute, 1 a sibling."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, module) for module in modules]
    return found


def is_within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


# ----------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> list[str]:
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and a build without it needs the network")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it builds
    source.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("granalign_hf-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.write_bytes(source.read_bytes())
    elif source.is_dir() and source.name != "__pycache__":
        target.mkdir()
        for entry in source.iterdir():
            copy(entry, target / entry.name)


def test_the_wheel_holds_every_source_file(wheel_files):
    packages = {"granalign_hf": "granalign_hf"} | {name: f"granalign_hf/{name}" for name in FOLDERS[1:]}
    for folder, package in packages.items():
        for path in sources(folder):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in wheel_files
    for recipe in (ROOT / "training" / "recipes").glob("*.yaml"):
        assert f"granalign_hf/training/recipes/{recipe.name}" in wheel_files
    for name in ("template.md", *(example.file for example in (*SCENES, *PHOTOGRAPHS))):
        assert f"granalign_hf/model_cards/{name}" in wheel_files
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)


def test_the_wheel_brings_one_top_level_package(wheel_files):
    top_level = {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name}
    assert top_level == {"granalign_hf"}


# ------------------------------------------------------------------------------------------------- who may know whom


def test_modeling_is_flat_and_self_contained():
    siblings = {path.stem for path in sources("modeling")}
    for path in sources("modeling"):
        assert path.parent == ROOT / "modeling", f"{path} lies in a sub-package, which remote code cannot load"
        for level, module in imports(path):
            if level == 0:
                allowed = MODELING_MAY_IMPORT | sys.stdlib_module_names
                assert is_within(module, allowed), f"{path.name} imports {module}"
            else:
                assert level == 1 and module in siblings, f"{path.name} imports {'.' * level}{module}"


def test_nothing_points_back_up():
    for path in sources("granalign_hf"):
        for level, module in imports(path):
            name = module if level == 0 else f"granalign_hf.{module}"
            assert not is_within(name, {"granalign_hf.training", "training"}), f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["losses", "similarity", "attention", "tiles", "layout", "pairwise", "projection"])
def test_numeric_files_know_no_config(name):
    for level, module in imports(ROOT / "modeling" / f"{name}.py"):
        assert not (level == 1 and module in {"configuration_granalign", "modeling_granalign"}), f"{name} imports {module}"


def test_evaluation_knows_numpy_only():
    for level, module in imports(ROOT / "granalign_hf" / "evaluation.py"):
        assert level == 0 and is_within(module, {"numpy"} | sys.stdlib_module_names), f"evaluation imports {module}"


# -------------------------------------------------------------------------------------------------- sizes and names


def test_files_stay_small():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for folder in FOLDERS for path in sources(folder)}
    too_long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"


def test_public_names():
    assert granalign_hf.__all__ == PUBLIC_NAMES
    assert all(hasattr(granalign_hf, name) for name in PUBLIC_NAMES)


def test_constraints_pin_every_requirement():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {bare_name(requirement) for requirement in wanted} - pinned == {"granalign-hf"}


def bare_name(requirement: str) -> str:
    return requirement.replace("[", ">").replace("=", ">").replace("<", ">").split(">")[0].strip().lower()
