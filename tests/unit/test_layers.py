"""Who may import whom. Imports point down only, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torchtitan_liger

PACKAGE = Path(torchtitan_liger.__file__).parent

# From the bottom up. A module may import from the rows below its own.
LAYERS = (
    {"job_config", "loss_curves", "device"},
    {"cli"},
    {"loss_curves_judge", "config_checks"},
    {"loss_curves_words"},
    {"loss_curves_report"},
    {
        "head_loss.options",
        "head_loss.checks",
        "head_loss.chunking",
        "head_loss.products",
    },
    {"head_loss.statistics", "head_loss.reference", "head_loss.triton_blocks"},
    {"head_loss.triton_statistics", "head_loss.triton_gradients"},
    {"head_loss.triton_words"},
    {"head_loss.triton_one_trip", "head_loss.triton_mixture"},
    {"head_loss.sweeps", "head_loss.vocab_parallel"},
    {"head_loss.triton_sweeps"},
    {"head_loss.calls"},
    {"head_loss.sequences"},
    {"head_loss.terms"},
    {
        "head_loss.policy_terms",
        "head_loss.preference_terms",
        "head_loss.distillation",
    },
    {"head_loss.evaluate"},
    {"head_loss.passes"},
    {"head_loss.gradients"},
    {"head_loss.chunked"},
    {"head_loss.custom_op"},
    {"head_loss.engine"},
    {"head_loss.functional"},
    {"head_loss"},
    {"liger_api", ""},
    {"full_logits", "head_loss_config", "head_loss_plan", "head_loss_report"},
    {"lm_head", "config_validator", "data"},
    {"parallelize", "preflight", "validator"},
    {"models"},
    {"trainer"},
    {"train"},
)
# The only modules that may import these packages.
OUTSIDE = {
    "liger_kernel": {"liger_api"},
    "torchtitan": {
        "config_validator",
        "data",
        "device",
        "parallelize",
        "preflight",
        "validator",
        "models",
        "trainer",
        "train",
    },
    "triton": {
        "head_loss.triton_blocks",
        "head_loss.triton_one_trip",
        "head_loss.triton_gradients",
        "head_loss.triton_mixture",
        "head_loss.triton_statistics",
        "head_loss.triton_words",
    },
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            "import_module"
        ):
            module = node.args[0]
            # Others are the user's: `experimental.custom_import`, the config module.
            of_user = path.stem in ("trainer", "config_checks")
            assert isinstance(module, ast.Constant) or of_user, path
            yield getattr(module, "value", "")


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} == set().union(*LAYERS)


def test_imports_point_down_only():
    layer_of = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for name, path in modules():
        for imported in imports(path):
            package, _, target = imported.partition(".")
            if package == "torchtitan_liger" and target in layer_of and target != name:
                assert layer_of[target] < layer_of[name], f"{name} imports {imported}"


def test_foreign_packages_are_imported_where_they_belong():
    for name, path in modules():
        for imported in imports(path):
            allowed = OUTSIDE.get(imported.partition(".")[0])
            assert allowed is None or name in allowed, f"{name} imports {imported}"


def test_importing_the_package_imports_neither_torchtitan_nor_liger():
    code = (
        "import sys, torchtitan_liger\n"
        "print([m for m in ('torchtitan', 'liger_kernel') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_files_have_one_subject():
    for folder in (PACKAGE, PACKAGE.parent / "scripts"):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
