"""The layers: what each file may import, that imports form no circle, and what `import triscale` leaves unloaded.

A file imports from lower layers and from its own folder. In layers 2 and 3 each name below is a folder of its own, and
siblings never import each other; layer 4, the edge, wires them together.
"""

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

import triscale

PACKAGE = ROOT / "triscale"
# A new file gets its place here. Files of the plan that don't exist yet are listed, so that they are held to it from the start.
LAYERS = (
    {
        "architecture",
        "budget",
        "cost_model",
        "detector",
        "detector_budget",
        "detector_memory",
        "detector_recipe",
        "download",
        "families",
        "files",
        "imagenet",
        "memory_model",
        "naming",
        "paper",
        "quantities",
        "recipe",
        "recipes",
        "replay",
        "scaling",
        "text",
        "version",
    },
    {"blocks", "kernels", "latency", "model"},
    {"data", "evaluate", "explain", "inference", "run_log", "train", "weights"},
    {"classify", "deploy", "detect", "predict", "reproduce", "search", "transfer"},
    {"__init__", "__main__", "cli", "commands", "demo", "report", "search_report", "serve", "training_report"},
)
# Breaches that exist. One that is mended has to leave this list.
KNOWN_BREACHES: set[str] = set()


def module_name(path):
    """triscale/data/loader.py -> data.loader; triscale/data/__init__.py -> data; triscale/__init__.py -> __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module):
    top = module.split(".")[0]
    found = [i for i, names in enumerate(LAYERS) if top in names]
    assert len(found) == 1, f"give '{top}' one layer in {__name__}.LAYERS; it has {len(found)}"
    return found[0]


def for_typing_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(module, *, whole=True):
    """Full names that the file imports, those inside functions too unless `whole` is false; not those for type checkers."""
    package = ["triscale", *module.split(".")]
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    elif module == "__init__":
        package = ["triscale"]
    found = []
    waiting = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            found += [f"{base}.{alias.name}" for alias in node.names]
        elif for_typing_only(node):
            waiting += node.orelse
        elif whole or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found


def own(name):
    """The module of ours that a full name lies in, None for a name of someone else's."""
    head, *parts = name.split(".")
    if head != "triscale":
        return None
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def breaches(module, targets):
    here = layer(module)
    for name in targets:
        target = own(name)
        if target is None:
            if here == 0 and name.split(".")[0] not in sys.stdlib_module_names:
                yield f"{module} imports {name}: layer 0 has the standard library alone"
        elif layer(target) > here:
            yield f"{module} imports {target}: layer {here} must not know layer {layer(target)}"
        elif layer(target) == here and here in (2, 3) and target.split(".")[0] != module.split(".")[0]:
            yield f"{module} imports {target}: siblings of layer {here}"


def test_files_import_from_lower_layers_or_their_own_folder():
    assert {b for module in MODULES for b in breaches(module, imports(module))} == KNOWN_BREACHES


@pytest.mark.parametrize(
    ("module", "target", "told"),
    [
        ("scaling", "torch.nn", "standard library alone"),
        ("scaling", "triscale.model.build", "must not know layer 1"),
        ("model", "triscale.weights.dialects.translate", "must not know layer 2"),
        ("weights.dialects", "triscale.train.loop", "siblings of layer 2"),
        ("predict", "triscale.reproduce.render", "siblings of layer 3"),
        ("model", "triscale.build", "must not know layer 4"),
        ("scaling", "math", None),
        ("weights.dialects", "triscale.weights.model_file", None),
        ("model", "triscale.blocks.make_block", None),
        ("cli", "triscale.demo.run", None),
    ],
)
def test_the_rule_tells_breaches_from_what_is_allowed(module, target, told):
    found = list(breaches(module, [target]))
    assert (told in found[0]) if told else not found


def test_imports_are_found_wherever_they_stand():
    assert "triscale.cost_model.table" in imports("architecture")
    assert "triscale.cost_model.table" not in imports("architecture", whole=False)
    assert "torch.Tensor" not in imports("weights.dialects")
    assert own("triscale.cost_model.table") == "cost_model"
    assert own("triscale.paper") == "paper"
    assert own("triscale.arch") == "__init__"


def test_imports_at_the_head_of_files_form_no_circle():
    graph = {module: {own(name) for name in imports(module, whole=False)} - {None, module} for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_no_module_bears_the_name_of_a_public_function():
    """`triscale.cost` must be the function wherever a module was imported before."""
    files = {module.split(".")[0] for module in MODULES} | set.union(*LAYERS)
    assert files & set(triscale.__all__) == set()


def test_every_public_name_is_there():
    assert set(triscale.__all__) == {"__version__", *triscale._HOME}
    for name in triscale.__all__:
        assert getattr(triscale, name) is not None
    assert set(triscale.__all__) <= set(dir(triscale))
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        _ = triscale.bild


def loaded_by(code):
    """Names of the heavy libraries that a fresh interpreter has loaded after `code`."""
    heavy = "('torch', 'numpy', 'torchvision', 'PIL', 'matplotlib', 'safetensors', 'tyro')"
    script = f"{code}\nimport sys\nprint(*(m for m in {heavy} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_import_triscale_loads_no_heavy_library():
    assert loaded_by("import triscale") == set()


def test_layer_0_and_what_it_computes_load_no_heavy_library():
    modules = [f"import triscale.{name}" for name in sorted(LAYERS[0] & set(MODULES))]
    used = (
        "import triscale as ts; a = ts.arch('efficientnet_b0'); str(a); ts.Arch.from_json(a.to_json()); ts.cost(a).memory; ts.fit_budget(a, macs=2e9)"
    )
    assert loaded_by("\n".join([*modules, used])) == set()


def test_the_name_maps_load_no_heavy_library():
    assert loaded_by("import triscale.weights.dialects") == set()


def test_the_check_sees_what_is_loaded():
    assert "numpy" in loaded_by("import triscale.data.decode")
