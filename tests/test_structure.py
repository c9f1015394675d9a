"""The shape of the package: which file may import which, how long things may be, and that one file adds a method."""

from __future__ import annotations

import ast
import inspect
import symtable
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import corelora
from corelora import CoreLoraConfig, register_method
from corelora.errors import CoreLoraError
from corelora.outer import OuterStart, outer_start
from corelora.registry import METHODS, OUTERS
from corelora.spec import Choices
from laws import test_methods as laws
from laws.cases import KINDS, adapted, base_model, batch, config, stir

SOURCE = Path(corelora.__file__).parent
FILES = {str(p.relative_to(SOURCE).with_suffix("")): p for p in sorted(SOURCE.rglob("*.py"))}

# Lower layers never import higher ones. A folder stands for all of its files.
LAYERS = [
    ["errors", "enums"],
    ["registry"],
    ["spec"],
    ["outer", "layers"],
    ["core", "sampling"],
    ["methods"],
    ["storage"],
    ["factor"],
    ["adapter"],
    ["measured"],
    ["kernels", "convert", "stats", "gradients"],
    ["card"],
    ["config"],
    ["folding", "fusing"],
    ["loading"],
    ["tuner_layer"],
    ["checks", "combine", "fold"],
    ["peft_plugin"],
    ["folders", "servers"],
    ["exportcheck", "merged"],
    ["export", "merged"],
    ["__init__"],
    ["plan_memory"],
    ["plan"],
    ["tasks"],
    ["recipe"],
    ["run"],
    ["data"],
    ["vision", "diffusion"],
    ["train"],
    ["evaluate", "bench"],
    ["compare"],
    ["quickstart"],
    ["commands"],
    ["cli", "__main__"],
]
# Files that look at PEFT's and transformers' insides; the rest knows neither.
PEFT_FILES = {"storage", "tuner_layer", "peft_plugin", "config"}

# Modules of peft that its documentation names, beside its front door.
PEFT_PUBLIC = ("peft.optimizers",)

# Longer than the limits for a reason that is written here; everything else keeps them.
LONG_FUNCTIONS: dict[str, str] = {}
LONG_FILES: dict[str, str] = {}
MANY_ARGUMENTS: dict[str, str] = {
    "export.export_lora": "public; the options after the folders are keywords of the command line",
    "spec.register_method": "one keyword a field of Method; called with names only",
    "kernels.core_linear._CoreLinear.forward": "an autograd function takes its tensors one by one",
    "peft_plugin.CoreLoraModel._create_and_replace": "PEFT's own signature",
}


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


@cache
def _imports(name: str) -> tuple[str, ...]:
    """The modules that a file imports at run time, as dotted names; blocks under TYPE_CHECKING don't run."""
    tree, found = _tree(name), []
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written out in full"
            assert node.module
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _layer(module: str) -> int | None:
    """The height of "corelora.x.y" or of a file "x/y"; None for other modules and for names inside a module."""
    parts = module.removeprefix("corelora.").replace("/", ".").split(".")
    for height, names in enumerate(LAYERS):
        if parts[0] in names:
            return height
    return None


def test_every_file_has_its_place():
    """A new file is put into the table above, where its direction is a decision."""
    assert not [name for name in FILES if _layer(name) is None]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    """registry <- spec <- outer, core <- methods <- adapter <- tuner_layer <- peft_plugin <- run <- cli."""
    own = _layer(name)
    assert own is not None
    for module in _imports(name):
        if not module.startswith("corelora."):
            continue
        other = _layer(module)
        if other is None:  # a name of the package itself, such as corelora.CoreLoraConfig: the top
            other = _layer("__init__")
        same_place = name.split("/")[0] == module.split(".")[1]
        assert other is not None
        assert other < own or same_place or (other == own and name.split("/")[0] in LAYERS[own]), (
            f"{name} imports {module}, which rests on it"
        )


@pytest.mark.parametrize("name", [n for n in FILES if n not in PEFT_FILES])
def test_peft_internals_stay_in_their_files(name):
    """peft's modules below its front door are imported in four files only."""
    inside = [m for m in _imports(name) if m.startswith("peft.") and not _is_public(m)]
    assert not inside, f"{name} imports {inside}"


def _is_public(module: str) -> bool:
    import peft

    return module.startswith(PEFT_PUBLIC) or (module.count(".") == 1 and module.split(".")[1] in peft.__all__)


@pytest.mark.parametrize("name", FILES)
def test_comprehensions_agree_on_a_name(name):
    """Python 3.12.0 to 3.12.3 loses a global that is the variable of another comprehension in the same function."""
    pending = [symtable.symtable(FILES[name].read_text(), name, "exec")]
    while pending:
        scope = pending.pop()
        pending += scope.get_children()
        inner = [c for c in scope.get_children() if c.get_name() in ("listcomp", "setcomp", "dictcomp")]
        symbols = [s for comprehension in inner for s in comprehension.get_symbols()]
        own = {s.get_name() for s in symbols if s.is_local()}
        assert not own & {s.get_name() for s in symbols if s.is_global()}, f"{name}: {scope.get_name()}"


@pytest.mark.parametrize("name", FILES)
def test_sizes(name):
    """Files to 400 lines, functions to 40 (60 with a reason), 7 arguments, nesting of 3."""
    assert len(FILES[name].read_text().splitlines()) <= 400 or name in LONG_FILES
    for qualified, node in _functions(name):
        code = _code_lines(node)
        assert code <= 40 or (code <= 60 and qualified in LONG_FUNCTIONS), f"{qualified}: {code} lines"
        a = node.args
        count = len([x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls", "ctx")])
        assert count <= 7 or qualified in MANY_ARGUMENTS or _is_op(node), f"{qualified}: {count} arguments"
        assert _depth(node) <= 3, f"{qualified}: nested {_depth(node)} deep"


def _functions(name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{prefix}.{child.name}", child
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from walk(child, f"{prefix}.{child.name}")

    yield from walk(_tree(name), name.replace("/", "."))


def _is_op(node: ast.FunctionDef) -> bool:
    """A custom op, or its shape-only twin: PyTorch wants flat tensors and numbers there, no dataclass."""
    return any((d := ast.unparse(x)).startswith("operation(") or "register_fake" in d for x in node.decorator_list)


def _code_lines(node: ast.FunctionDef) -> int:
    """Lines from `def` to the end, less the docstring."""
    lines = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def _depth(node: ast.AST, own: int = 0) -> int:
    deepest = own
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        nests = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        # `elif` is a branch of its `if`, not a level.
        is_elif = (
            isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse and len(node.orelse) == 1
        )
        deepest = max(deepest, _depth(child, own + (nests and not is_elif)))
    return deepest


@pytest.mark.parametrize("name", FILES)
def test_every_public_thing_is_documented(name):
    """A docstring on each module, public class and public function."""
    tree = _tree(name)
    assert ast.get_docstring(tree), name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name}"
            annotated = not isinstance(node, ast.FunctionDef) or node.returns is not None
            assert annotated, f"{name}.{node.name} has no return type"


def test_no_branch_on_a_methods_name():
    """Outside methods/, no code compares with a method's name: a method is its choices."""
    for name in FILES:
        if name.startswith(("methods/", "run/", "tasks/", "cli", "commands/")):
            continue
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not words & set(METHODS), f"{name}:{node.lineno} compares with {words & set(METHODS)}"


# -- a method from outside the package ------------------------------------------------------------------------------


@pytest.fixture
def toy():
    """A method with an outer start of its own, registered as a user would; taken out again afterwards."""

    @outer_start("toy_ones")
    def ones(weight, spec, d, generator):
        """A from the generator, B[o,r] of column means of W: nothing that the package has."""
        o, i = weight.shape
        A = torch.randn(spec.r, i, generator=generator) / i**0.5
        return OuterStart(A=A, B=weight.full().mean(dim=1, keepdim=True).expand(o, spec.r) + torch.eye(o, spec.r))

    register_method(
        "toy",
        title="Toy",
        paper="this test",
        default=Choices(outer="toy_ones", core="dense", train=("core", "B"), start="subtract", core_start="orthogonal"),
        published=Choices(outer="toy_ones", core="nested", train=("core",), start="zero", core_start="zero_b"),
    )
    yield "toy"
    METHODS.remove("toy")
    OUTERS.remove("toy_ones")


LAWS = [f for n, f in vars(laws).items() if n.startswith("test_") and "tolerances" not in n]


@pytest.mark.parametrize("dtype", laws.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["default", "published"])
def test_a_method_from_outside_inherits_the_laws(toy, variant, kind, dtype):
    """Every law of the case table holds for it, on every layer kind and storage."""
    assert len(LAWS) >= 9

    def conf(**settings):
        return config(kind, METHODS[toy].choices(variant), method=toy, variant=variant, **settings)

    for law in LAWS:
        takes_storage = "case" in inspect.signature(law).parameters  # else it is a law in float64
        law((conf, kind, dtype) if takes_storage else (conf, kind))


@pytest.mark.parametrize("store_outer", [None, False])
def test_a_method_from_outside_end_to_end(toy, store_outer, tmp_path):
    """Listed, configured, trained, saved, loaded: also with its frozen factors made again at load."""
    assert toy in corelora.list_methods()
    conf = CoreLoraConfig(method=toy, r=3, target_modules=["layer"], store_outer=store_outer)
    model = get_peft_model(base_model("linear"), conf).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(8)
    loaded = PeftModel.from_pretrained(base_model("linear"), tmp_path, is_trainable=True).eval()
    x = batch("linear")
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(model(x), base_model("linear")(x))


def test_an_unknown_toy_is_missed_by_name():
    """Once it is taken out, its name is unknown again."""
    assert "toy" not in METHODS
    with pytest.raises(CoreLoraError, match="unknown method 'toy'"):
        adapted("linear", CoreLoraConfig(method="toy"))


def test_importing_corelora_registers_with_peft_once():
    """Importing again, or registering again, changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from corelora.peft_plugin import register

    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["CORELORA"] is CoreLoraConfig
