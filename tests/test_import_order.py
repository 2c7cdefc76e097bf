"""Imports go down: each module may import only modules of lower levels, and the Hub payload only what the Hub has."""

import ast
import sys
from pathlib import Path


SOURCE = Path(__file__).parent.parent / "src" / "engram_hf"
# Lower levels know nothing of higher ones. A prefix with a trailing dot stands for all modules of a folder.
LEVELS = [
    [
        "modeling.ids_reach",
        "modeling.configuration_checks",
        "modeling.disk_safetensors",
        "modeling.table_formats",
        "modeling.table_gradients",
    ],
    ["modeling.disk_files", "modeling.ids_hashing"],
    ["modeling.configuration_engram_moe", "modeling.table_cut"],
    ["modeling.disk_reading", "modeling.table_blocks", "modeling.table_ranks"],
    ["modeling.table_changes", "modeling.table_patches"],
    ["modeling.table"],
    ["modeling.memory_layer", "modeling.memory_patches", "modeling.table_placement", "modeling.checkpoint_loading"],
    ["modeling.checkpoint_saving"],
    ["modeling.memory_model"],
    ["modeling.modeling_engram_moe"],
    [
        "adapters.memory_config",
        "adapters.table_parts",
        "adapters.rows_in_memory",
        "adapters.same_name",
        "adapters.sources",
    ],
    ["adapters.memory_files", "adapters.served_embedding", "adapters.taking_over"],
    ["adapters.served_prefetch"],
    ["planning", "counting"],
    [
        "insight.memory_layers",
        "insight.intervals",
        "insight.drawing",
        "distributed.",
    ],
    ["insight.text_rows"],
    ["insight.silencing", "insight.row_use", "insight.ngram_classes"],
    ["insight.tracing", "insight.pictures", "insight.hidden_layers"],
    ["insight.showing"],
    ["insight.explorer"],
    ["insight."],
    ["checkpoints.checking"],
    ["checkpoints.rewriting"],
    ["checkpoints."],
    [
        "training.row_rules",
        "training.trained_rows",
        "training.row_naming",
        "training.work_files",
        "training.dense_parts",
        "training.callbacks.reporting",
    ],
    ["training.row_exchange"],
    ["training.row_state"],
    ["training.row_updates"],
    ["training."],
    ["adapters.memory_hooks"],
    ["adapters.memory_class"],
    ["adapters.added_memory"],
    ["adapters.served_model", "adapters.row_patches", "adapters.facts"],
    ["adapters.fact_reports"],
    ["adapters."],
    ["checkpoints.merging"],
    ["hub.card", "hub.uploading"],
    ["hub."],
    ["commands.inspecting"],
    ["commands.", ""],
]
BROUGHT_BY_TORCH_AND_TRANSFORMERS = {
    "torch",
    "transformers",
    "numpy",
    "sympy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    # Only where `is_accelerate_available()`, which the Hub's own check of imports skips.
    "accelerate",
}


def level_of(module: str) -> int:
    for is_it in (str.__eq__, lambda module, name: name.endswith(".") and module.startswith(name)):
        for level, names in enumerate(LEVELS):
            if any(is_it(module, name) for name in names):
                return level
    raise AssertionError(f"{module} has no level: add it to LEVELS, where it belongs")


def modules() -> dict[str, ast.Module]:
    """Dotted names below engram_hf ("" is the package itself); the files that only describe a folder are left out."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__init__" or name == "":
            trees[name] = ast.parse(path.read_text())
    return trees


def imports(name: str, tree: ast.Module) -> list[tuple[str, int]]:
    """What a module imports, also inside functions: absolute names, and its own package's as ".name"."""
    package = name.split(".")[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            found.append(("." + ".".join([*base, *(node.module or "").split(".")]).strip("."), node.lineno))
    return found


def test_every_import_goes_to_a_lower_level():
    wrong = []
    for name, tree in modules().items():
        for imported, line in imports(name, tree):
            own = imported.removeprefix("engram_hf").removeprefix(".")
            if imported.startswith((".", "engram_hf")) and level_of(own) >= level_of(name):
                wrong.append(f"{name}:{line} imports {own}")
    assert not wrong, wrong


def test_the_payload_imports_only_siblings_and_what_the_hub_brings():
    wrong = []
    for name, tree in modules().items():
        if not name.startswith("modeling."):
            continue
        for imported, line in imports(name, tree):
            top = imported.split(".")[0]
            is_sibling = imported.startswith(".modeling.") and imported.count(".") == 2
            if not (is_sibling or top in BROUGHT_BY_TORCH_AND_TRANSFORMERS or top in sys.stdlib_module_names):
                wrong.append(f"{name}:{line} imports {imported}")
    assert not wrong, wrong
