"""The distribution: what a wheel carries, what an import pulls in, and that constraints and requirements agree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

WORKFLOWS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / ".github/workflows").glob("*.yml"))

# A distribution that has whatever name transformers imports from it: usable as class, function or decorator.
FOREIGN_KERNELS = """
foreign = True
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args and callable(args[0]) else self
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def _python(code: str, *, path: Path | None = None, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints, started in ``cwd`` with ``path`` in front of everything installed."""
    program = f"import sys\nif {str(path)!r} != 'None': sys.path.insert(0, {str(path)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    loaded = _python(
        "import lqedu\nprint(*sorted(m for m in ('torch', 'triton', 'transformers', 'lqedu_kernels') if m in sys.modules))"
    )
    assert loaded == ""


def test_helpers_of_the_book_need_no_torch() -> None:
    assert _python("import lqedu.book.results\nprint('torch' in sys.modules)") == "False"


def test_transformers_builds_a_model_from_the_repository_root(tmp_path: Path) -> None:
    """Beside our folder ``kernels``, without Triton, and with the foreign distribution ``kernels`` installed.

    transformers asks for that distribution by name and imports from it; were our folder a package, it would come first.
    """
    from transformers.utils import import_utils

    release = getattr(import_utils, "KERNELS_MIN_VERSION", "0.11.0")
    info = tmp_path / f"kernels-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {release}\n", encoding="utf-8")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FOREIGN_KERNELS, encoding="utf-8")
    code = f"""
sys.modules["triton"] = None
sys.path.append({str(tmp_path)!r})  # where installed packages are: behind the working directory
import lqedu
from importlib.metadata import version
assert version("kernels") == "{release}"
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1))
import kernels, torch
print(kernels.foreign, tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""
    assert _python(code).splitlines()[-1] == "True (1, 3, 32)"


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_say_that_triton_is_missing() -> None:
    code = (
        "sys.modules['triton'] = None\ntry:\n    import lqedu_kernels\nexcept ImportError as error:\n    print(error)"
    )
    message = _python(code, path=ROOT / "kernels")
    assert message.count("\n") == 0
    assert "Triton" in message
    assert "lqedu[gpu]" in message


def test_kernels_import_nothing_of_lqedu() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) lqedu\b(?!_)", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_wheel_carries_both_packages_and_the_recorded_results(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-w",
        str(tmp_path),
    ]
    source = tmp_path / "source"  # a copy: setuptools writes into the folder it builds from
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    wanted = set()
    for folder, suffixes in (
        ("lqedu", (".py", ".mjs", ".css")),
        ("kernels", (".py", ".json", ".md")),
        ("book/results", (".json", ".csv")),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT)
                (source / relative).parent.mkdir(parents=True, exist_ok=True)
                (source / relative).write_bytes(path.read_bytes())
                wanted.add(relative.as_posix().replace("kernels/", "", 1).replace("book/results/", "lqedu/_results/"))
    subprocess.run([*command, str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("lqedu-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= names, f"missing from the wheel: {sorted(wanted - names)}"
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "book/"))]


def test_constraints_hold_every_requirement_and_satisfy_it() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    assert next(line for line in lines if not line.startswith("#")).startswith("torch==")
    extras = PYPROJECT["optional-dependencies"]
    for text in [*PYPROJECT["dependencies"], *extras["notebook"], *extras["book"], *extras["dev"]]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"constraints.txt does not hold {name}"
        assert requirement.specifier.contains(pins[name]), f"{text} excludes the pinned {pins[name]}"


def test_runtime_requirements_are_lower_bounds() -> None:
    """An upper bound would change what a reader's environment already has."""
    for text in [*PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"]["notebook"]]:
        assert {s.operator for s in Requirement(text).specifier} == {">="}, text


def test_console_script_runs() -> None:
    assert PYPROJECT["scripts"] == {"lqedu": "lqedu.cli:main"}
    assert "lqedu" in _python("from lqedu.cli import main\nsys.argv = ['lqedu', '--help']\nmain()").lower()


@pytest.mark.parametrize("name", ["_config.yml", "_toc.yml", "CITATION.cff", *WORKFLOWS])
def test_configuration_is_valid_yaml(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
