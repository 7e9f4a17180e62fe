"""Installation: the extras' promises, one version of each locked package, and a set-up that says what it does."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.envs import make_envs
from fabricrl.utils import extras
from tests.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = tomllib.loads((ROOT / "poetry.lock").read_text())

# --- MuJoCo


def test_the_extra_of_mujoco_excludes_the_release_that_breaks_its_environments() -> None:
    (requirement,) = [line for line in PROJECT["optional-dependencies"]["mujoco"] if line.startswith("mujoco")]
    allowed = SpecifierSet(requirement.removeprefix("mujoco"))
    assert {"3.3.0", "3.17.0"} == set(allowed.filter(["3.2.7", "3.3.0", "3.17.0", "4.0.0", "4.1"]))
    (locked,) = [package["version"] for package in LOCK["package"] if package["name"] == "mujoco"]
    assert locked in allowed


@pytest.mark.parametrize(
    ("package", "env_id"),
    [
        ("mujoco", "Hopper-v5"),
        ("mujoco", "Hopper-v4"),
        ("gymnasium_robotics", "gymnasium_robotics:FetchReach-v4"),
        ("dm_control", "shimmy:dm_control/cartpole-balance-v0"),
    ],
)
def test_an_environment_of_each_family_of_mujoco_can_be_built_and_leaves_no_file(
    package: str, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mujoco = pytest.importorskip("mujoco")
    pytest.importorskip(package)
    if package == "gymnasium_robotics" and (3, 12) <= Version(mujoco.__version__).release < (4,):
        pytest.skip("Fetch of gymnasium-robotics 1.4.2 needs MuJoCo below 3.12")
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its complaints into the current folder
    envs = make_envs(PPOArgs(env_id=env_id, num_envs=1, vectorization="sync"), 0, tmp_path)
    try:
        envs.reset(seed=1)
        _, rewards, *_ = envs.step(envs.action_space.sample())
    finally:
        envs.close()
    assert np.isfinite(rewards).all()
    assert not list(tmp_path.iterdir())


# --- The lock file


def systems() -> Iterator[dict[str, str]]:
    """The environments that the lock file is for, as markers see them."""
    kinds = [("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64")]
    kinds.append(("win32", "Windows", "AMD64"))
    for sys_platform, platform_system, platform_machine in kinds:
        for python in ("3.11", "3.12", "3.13"):
            yield {
                "sys_platform": sys_platform,
                "platform_system": platform_system,
                "platform_machine": platform_machine,
                "os_name": "nt" if sys_platform == "win32" else "posix",
                "implementation_name": "cpython",
                "platform_python_implementation": "CPython",
                "python_version": python,
                "python_full_version": f"{python}.4",
            }


def holds(markers: Any, system: dict[str, str]) -> bool:
    """True if a locked marker holds with all extras; one of several groups is enough."""
    texts = markers.values() if isinstance(markers, dict) else [markers] if markers else []
    extras = [*PROJECT["optional-dependencies"], ""]
    return not texts or any(Marker(text).evaluate(system | {"extra": extra}) for text in texts for extra in extras)


def installed(system: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Packages that the lock file installs there, by name."""
    found = defaultdict(list)
    for package in LOCK["package"]:
        if holds(package.get("markers"), system):
            found[package["name"]].append(package)
    return found


@pytest.mark.parametrize("system", systems(), ids=lambda system: "-".join(list(system.values())[i] for i in (0, 2, 6)))
def test_one_version_of_each_package_is_locked(system: dict[str, str]) -> None:
    packages = installed(system)
    assert "torch" in packages
    several = {name: [one["version"] for one in found] for name, found in packages.items() if len(found) > 1}
    assert not several, "these would be installed over each other"


def test_locked_nvidia_packages_are_those_that_torch_and_its_toolkit_name() -> None:
    system = next(systems())
    packages = {name: found[0] for name, found in installed(system).items()}
    asked = [packages["torch"]["dependencies"], packages["cuda-toolkit"]["dependencies"]]
    named = {name: what for part in asked for name, what in part.items() if name.startswith("nvidia-")}
    assert len(named) > 10
    for name, what in named.items():
        version, allowed = packages[name]["version"], what["version"]
        exact = allowed if allowed[0] in "<>=!~" else f"=={allowed}"
        assert Version(version) in SpecifierSet(exact), f"{name} {version} is locked, {allowed} is asked for"
    always = {name for name, package in packages.items() if not package["optional"]}  # an extra brings NVML's, too
    assert {name for name in always if name.startswith("nvidia-")} == named.keys()


# --- make setup


def test_setup_says_what_it_does_before_it_takes_its_time(tmp_path: Path) -> None:
    """With a stand-in for Python that installs nothing, and makes virtual environments of which it is the Python."""
    if shutil.which("make") is None:
        pytest.skip("make is not here")
    python, calls = tmp_path / "python", tmp_path / "calls"
    venv = tmp_path / "venv"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}; echo "run: $@"\n'
        f'[ "$2" != venv ] || {{ mkdir -p {venv}/bin; cp "$0" {venv}/bin/python; }}\n'
    )
    python.chmod(0o755)
    line = ["make", "--no-print-directory", "-C", str(ROOT), "setup", f"PYTHON={python}", f"VENV={venv}"]
    ended = subprocess.run(line, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=60)
    assert ended.returncode == 0, ended.stderr
    lines = [text for text in ended.stdout.splitlines() if not text.startswith(("touch", "run: -c"))]
    said = ["".join(lines[at - 1 : at]) for at, text in enumerate(lines) if text.startswith("run: -m pip install")]
    assert len(said) == 3
    assert "pip" in said[0]
    assert "PyTorch" in said[1]
    assert "minutes" in said[1]
    assert "everything else" in said[2]
    assert "--group dev" in calls.read_text()
    again = subprocess.run(line, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=60)
    assert "run:" not in again.stdout, "what is installed is installed again"


# --- Files around the code


def test_pre_commit_runs_what_make_lint_runs() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nlint: setup\n")[1].split("\n\n")[0]
    linted = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()]
    hooks = re.findall(
        r"entry: \.venv/bin/([^,]+),(?: args: \[(.*?)\])?", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert [f"{entry} {args.replace(', ', ' ')}".strip() for entry, args in hooks] == linted


def test_type_checkers_find_the_types_of_what_is_installed() -> None:
    assert (ROOT / "fabricrl/py.typed").exists()  # packages take along what lies in them


def test_the_message_about_a_missing_extra_fits_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extras.pip_install("atari") == "pip install -e '.[atari]'"
    monkeypatch.setattr(extras, "ROOT", tmp_path)  # where a wheel has been unpacked
    assert extras.pip_install("atari") == "pip install 'fabricrl[atari]'"


def test_links_of_the_description_lead_somewhere_from_anywhere() -> None:
    text = (ROOT / PROJECT["readme"]).read_text()
    assert "![" not in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = "![a plot](docs/a.png)\n\nSee [Running](docs/running.md) and [it](https://example.org)."
    assert generate.description(page, None) == "See Running and [it](https://example.org)."
    there = "https://example.org/fabricrl"
    assert f"[Running]({there}/blob/main/docs/running.md)" in generate.description(page, there)


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\n## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_container_has_what_it_names() -> None:
    """Docker itself is not to be had here: what it would copy, install and start is there."""
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line]
    args = {name: value.strip('"') for kind, *rest in lines if kind == "ARG" for name, value in [rest[0].split("=", 1)]}
    (image,) = [rest[0] for kind, *rest in lines if kind == "FROM"]
    assert image.removeprefix("python:").removesuffix("-slim") in SpecifierSet(PROJECT["requires-python"])
    assert f"TORCH ?= {args['TORCH']}\n" in (ROOT / "Makefile").read_text()
    assert set(args["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    copied = {name for kind, *rest in lines if kind == "COPY" for name in rest[:-1]}
    assert copied >= {"fabricrl", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert all((ROOT / name).exists() for name in copied)
    assert copied <= {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    (command,) = [" ".join(rest) for kind, *rest in lines if kind == "CMD"]
    assert (ROOT / json.loads(command)[0]).exists()


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_pages_name_every_extra(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.search(r"extras: ([\w, ]+)", text)[1].split(", ")) if page == "README.md" else None  # type: ignore[index]
    if named is None:
        named = {
            name
            for row in re.findall(r"(?m)^\| (`[^|]+) \|", text.split("| extra |")[1].split("\n\n")[0])
            for name in re.findall(r"`(\w+)`", row)
        }
    assert named == set(PROJECT["optional-dependencies"])
