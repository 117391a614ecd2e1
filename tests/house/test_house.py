"""The repository's own rules."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci/house.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


def test_transformers_and_diffusers_import_from_the_repository_root() -> None:
    """The root is on sys.path here, so a package called `kernels` would be found and break both."""
    code = (
        "from transformers import UMT5EncoderModel\n"
        "from diffusers import AutoencoderKLWan, WanTransformer3DModel\n"
        "import reelforge.engine.model.wan\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reelforge.stages.cli import parser\nparser().format_help()\n"
        "heavy = {'torch', 'numpy', 'av', 'rich', 'matplotlib', 'scipy', 'diffusers', 'transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["generator", "folder", "wan", "generation"])
def test_the_engine_needs_no_diffusers(module: str) -> None:
    code = (
        f"import sys\nimport reelforge.engine.model.{module}\n"
        "print(sorted({'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle", "pickle, torch.load or torch.save"),
        ("    torch.load(path)", "pickle, torch.load or torch.save"),
        ("    dist.broadcast_object_list(things)", "pickle, torch.load or torch.save"),
        ("    except Exception as error:", "except without a named error"),
        ("    except:", "except without a named error"),
        ("    print(3)", "print outside the command line"),
        ("    x = os.environ['HOME']", "environment outside settings.py"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, rule: str) -> None:
    module = house()
    (tmp_path / "engine").mkdir()
    bad = tmp_path / "engine/bad.py"
    bad.write_text(f"def f():\n{line}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "sources", lambda *folders: [bad])
    broken = {bar.rule for bar in module.rule_bars() if bar.broken}
    assert broken == {rule}


def test_a_function_is_measured_without_its_docstring(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('def f():\n    """One\n\n    two.\n    """\n    return 1\n\n\nasync def g():\n    pass\n')
    assert house().function_lengths(file) == [2, 2]
