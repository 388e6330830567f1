"""The project's own rules: import order, packages, configuration fields that nothing reads, configuration files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["unitok.core", "unitok.data", "unitok.tokenizer", "unitok.mllm", "unitok.eval", "unitok.serve"]
FOLDERS = {"data": "unitok.data", "tokenizer": "unitok.tokenizer", "mllm": "unitok.mllm", "eval": "unitok.eval"}
SOURCES = [
    path
    for folder in ("unitok", *FOLDERS, "scripts", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "unitok" else ("unitok", *parts))


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the absolute one"
            names.append(node.module)
    return names


def layer(module: str) -> int:
    """Position in the import order; everything after the layers (command line, demo, scripts) comes last."""
    for position, name in enumerate(ORDER):
        if module == name or module.startswith(name + "."):
            return position
    return len(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_order(path):
    module = module_of(path)
    if module == "unitok":
        return  # its one import of a layer runs on first use only
    for name in imports_of(path):
        if name.startswith("unitok."):
            assert layer(name) <= layer(module), f"{module} imports {name}, which stands to its right"


def test_every_package_has_a_folder_with_init():
    """A folder of modules without __init__.py would be missing from the wheel."""
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_no_bare_top_level_imports():
    for path in [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]:
        for name in imports_of(path):
            assert name.split(".")[0] not in FOLDERS, f"{path}: import unitok.{name}, not {name}"


def test_every_configuration_field_is_read():
    """A field that nothing reads is a switch that does nothing."""
    text = {path: path.read_text() for path in SOURCES}
    everything = "\n".join(text.values())
    unread = []
    for path, source in text.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Config" for base in node.bases):
                fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                unread += [f"{path.name}:{node.name}.{f}" for f in fields if not re.search(rf"\.{f}\b", everything)]
    passed_whole = {"SamplerDefaults"}  # written into the export as one dictionary and read from there
    assert not [name for name in unread if name.split(":")[1].split(".")[0] not in passed_whole]


def test_packaged_configurations_are_valid():
    from unitok.core.config import load_config
    from unitok.eval.speed_mllm import MllmSpeedConfig
    from unitok.mllm.task import MllmTrainConfig
    from unitok.tokenizer.configuration import UniTokConfig
    from unitok.tokenizer.task import TokenizerTrainConfig

    files = sorted((ROOT / "configs" / "tokenizer").glob("*.yaml"))
    assert files
    for file in files:
        config = load_config(TokenizerTrainConfig, file)
        UniTokConfig(**config.model.model_dump())
        assert file.read_text().startswith("#"), f"{file} must open with command, hardware and expected figures"
    for file in sorted((ROOT / "configs" / "mllm").glob("*.yaml")):
        load_config(MllmSpeedConfig if file.stem == "bench" else MllmTrainConfig, file)
        assert file.read_text().startswith("#")


def test_importing_the_models_needs_no_training_library():
    """torch, timm and transformers are enough to use a model."""
    code = (
        "import sys\n"
        "blocked = ('deepspeed', 'webdataset', 'open_clip', 'torch_fidelity', 'lm_eval', 'sklearn', 'matplotlib',"
        " 'peft', 'liger_kernel', 'torchao')\n"
        "sys.modules.update({name: None for name in blocked})\n"
        "import unitok.tokenizer, unitok.mllm\n"
        "from unitok.tokenizer import UniTok, UniTokConfig\n"
        "import unitok.cli; unitok.cli.build_parser()\n"
        "UniTok(UniTokConfig(image_size=32, stem_width=8, stage_widths=(8, 8), stage_depths=(1, 1), width=32, depth=1,"
        " num_heads=2, decoder_stage_depths=(1, 1), num_codebooks=2, codebook_size=8, code_dim=4, embed_dim=8))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_lock_and_project_name_public_addresses_only():
    for name in ("uv.lock", "pyproject.toml"):
        hosts = set(re.findall(r"https?://([^/\"' ]+)", (ROOT / name).read_text()))
        assert hosts <= {"pypi.org", "files.pythonhosted.org", "github.com"}, hosts


def test_citation_is_yaml():
    assert len(yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]) >= 2
