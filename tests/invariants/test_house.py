"""The house rules that a machine can hold: who imports whom, what is never written, what is frozen.

These tests read the source as syntax trees, so they also see imports inside functions. A rule that
stands in the way of a better design may be changed here, with its reason in the commit.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import arra

SRC = Path(arra.__file__).parent


@dataclass(frozen=True)
class Module:
    name: str  # dotted, e.g. arra.train.loop
    path: Path
    tree: ast.Module

    def where(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(SRC.parent)}:{getattr(node, 'lineno', 0)}"


def _read_source() -> list[Module]:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


MODULES = _read_source()
NAMES = {module.name for module in MODULES}


def _nodes(*types: type[ast.AST]) -> Iterator[tuple[Module, ast.AST]]:
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, types):
                yield module, node


def _imports(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Every module that `module` imports, at the top or inside a function, as absolute names."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in NAMES else base), node


def _inside(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


# ---- arrows -------------------------------------------------------------------------------------

# What a part may import from arra; itself is always allowed.
ONLY = {
    "arra.files": (),
    "arra.batch": (),
    "arra.layout": ("arra.batch",),
    "arra.cross_entropy": (),
    "arra.objective": ("arra.cross_entropy", "arra.batch"),
    "arra.contrastive": ("arra.cross_entropy", "arra.batch", "arra.objective"),
    "arra.resolve": ("arra.files",),
    "arra.pages": ("arra.files",),
}
# What a part must never import, not even inside a function. The way down is
# cli -> study -> evaluate -> generate -> models, layout; cli -> train -> objective -> batch.
NEVER = {
    "arra.config": ("arra.train", "arra.generate", "arra.evaluate", "arra.study", "arra.data"),
    "arra.config_json": (
        *("arra.train", "arra.generate", "arra.evaluate", "arra.study", "arra.data"),
    ),
    "arra.recipes": ("arra.train", "arra.generate", "arra.evaluate", "arra.study", "arra.data"),
    "arra.models": (
        *("arra.objective", "arra.train", "arra.generate", "arra.evaluate", "arra.study"),
        *("arra.data", "arra.encoders", "arra.recipes"),
    ),
    "arra.encoders": (
        *("arra.batch", "arra.layout", "arra.objective", "arra.models", "arra.train"),
        *("arra.generate", "arra.evaluate", "arra.study", "arra.recipes"),
        "arra.image_tokenizers",
    ),
    "arra.image_tokenizers": (
        *("arra.batch", "arra.layout", "arra.objective", "arra.models", "arra.train"),
        *("arra.generate", "arra.study", "arra.recipes"),
    ),
    "arra.data": (
        *("arra.objective", "arra.models", "arra.train", "arra.generate", "arra.evaluate"),
        *("arra.study", "arra.recipes"),
    ),
    "arra.train": ("arra.encoders", "arra.evaluate", "arra.study"),
    "arra.generate": ("arra.objective", "arra.train", "arra.encoders", "arra.evaluate"),
    "arra.evaluate": ("arra.objective", "arra.train", "arra.recipes", "arra.study"),
}


def test_import_arrows() -> None:
    wrong = []
    for module in MODULES:
        for target, node in _imports(module):
            if not _inside(target, "arra"):
                continue
            if _inside(target, "arra.cli") and module.name not in ("arra.cli", "arra.__main__"):
                wrong.append(f"{module.where(node)} imports {target}: nothing imports the cli")
            for part, allowed in ONLY.items():
                if _inside(module.name, part) and not _inside(target, part, *allowed):
                    wrong.append(f"{module.where(node)}: {part} must not import {target}")
            for part, forbidden in NEVER.items():
                if (
                    module.name in ("arra.data.loader", "arra.data.sequences")
                    and part == "arra.data"
                ):
                    continue  # where prepared rows meet a model's layout and the objective
                if module.name == "arra.generate.captions" and _inside(
                    target, "arra.encoders.text"
                ):
                    continue  # where prompts become features, for models that take no words
                if _inside(module.name, part) and _inside(target, *forbidden):
                    wrong.append(f"{module.where(node)}: {part} must not import {target}")
    assert not wrong, "\n".join(wrong)


# The published families. Layout styles carry two of these names: they are formats, which other
# families use as well.
FAMILY = re.compile(
    r"llama|chameleon|anole|lumina|janus|emu_?3|qwen|gemma|mistral|smollm|gpt_?2|phi_?3", re.I
)
STYLES = {"grid", "chameleon", "lumina"}


def test_nothing_outside_models_knows_a_family() -> None:
    """Names and strings in code; docstrings and comments may explain, presets may name."""
    wrong = []
    for module in MODULES:
        if _inside(module.name, "arra.models", "arra.recipes", "arra.config", "arra.bench"):
            continue  # a benchmark measures one published protocol, and its original
        if module.name in (
            "arra.convert",
            "arra.image_tokenizers.published",
            "arra.image_tokenizers.frames",
        ):
            continue  # whose subject is other people's files
        docstrings = {
            id(node.value)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant):
                text = node.value if isinstance(node.value, str) else ""
                text = "" if id(node) in docstrings or text in STYLES else text
            else:
                fields = (getattr(node, f, "") for f in ("id", "attr", "arg", "name", "module"))
                text = " ".join(f for f in fields if isinstance(f, str))
            if FAMILY.search(text):
                wrong.append(f"{module.where(node)}: {text[:60]!r}")
    assert not wrong, "model families belong into arra/models:\n" + "\n".join(wrong)


# ---- what is never written ----------------------------------------------------------------------


def test_no_catch_all_modules() -> None:
    banned = re.compile(r"(^|_)(utils?|misc|common|helpers?)$")
    twins = re.compile(r"_(new|old|v\d|t2i|copy)$")
    last = {module.name.rpartition(".")[2]: module.name for module in MODULES}
    wrong = [full for name, full in last.items() if banned.search(name) or twins.search(name)]
    assert not wrong, f"name these after what they do: {wrong}"


def test_no_pickle_and_no_foreign_code() -> None:
    wrong = []
    for module in MODULES:
        for target, node in _imports(module):
            names = (
                {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            )
            if names in ({"UnpicklingError"}, {"PicklingError"}):
                continue  # to catch what torch.load raises, or what cannot go to another process
            if target.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve"):
                wrong.append(f"{module.where(node)} imports {target}")
    safe = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False}
    for module, node in _nodes(ast.keyword):
        assert isinstance(node, ast.keyword)
        if node.arg in safe:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if value is not safe[node.arg]:
                wrong.append(f"{module.where(node.value)}: {node.arg} must be {safe[node.arg]}")
    for module, node in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "np.fromfile", "numpy.fromfile"):
            wrong.append(f"{module.where(node)} calls {called}")
        keywords = {keyword.arg for keyword in node.keywords}
        if called == "torch.load" and "weights_only" not in keywords:
            wrong.append(f"{module.where(node)}: torch.load without weights_only=True")
    assert not wrong, "\n".join(wrong)


def test_no_swallowed_errors() -> None:
    """No bare except; a broad one must raise again."""
    wrong = []
    for module, node in _nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        caught = "" if node.type is None else ast.unparse(node.type)
        broad = not caught or re.search(r"\b(Base)?Exception\b", caught)
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if broad and not raises:
            wrong.append(f"{module.where(node)}: except {caught}")
    assert not wrong, "catch what you expect:\n" + "\n".join(wrong)


def test_no_hasattr_and_no_pass_through() -> None:
    """A protocol instead of hasattr; named parameters instead of **kwargs handed on.

    An override of a library's method may hand its **kwargs to super().
    """
    wrong = []
    for module, node in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if ast.unparse(node.func) == "hasattr":
            wrong.append(f"{module.where(node)}: hasattr")
    for module, function in _nodes(ast.FunctionDef):
        assert isinstance(function, ast.FunctionDef)
        if function.args.kwarg is None:
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).startswith("super()."):
                continue
            spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
            if function.args.kwarg.arg in spread:
                wrong.append(f"{module.where(node)}: **{function.args.kwarg.arg} handed on")
    assert not wrong, "\n".join(wrong)


def test_shape_suffixes_have_a_legend() -> None:
    """A file that names more than a few tensors by shape explains the letters at its top."""
    suffix = re.compile(r"^[a-z]\w*_[A-Z]{2,}$")
    wrong = []
    for module in MODULES:
        names = {n.id for n in ast.walk(module.tree) if isinstance(n, ast.Name)}
        shaped = sorted(n for n in names if suffix.match(n))
        explained = re.search("^(Legend|Names):", ast.get_docstring(module.tree) or "", re.M)
        if len(shaped) > 3 and not explained:
            wrong.append(f"{module.name}: {', '.join(shaped[:3])}")
    assert not wrong, "no legend for the shape suffixes in:\n" + "\n".join(wrong)


# ---- every option is read -----------------------------------------------------------------------


def _options() -> Iterator[tuple[Module, ast.ClassDef]]:
    """Dataclasses that hold what a user may set."""
    for module, node in _nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        named = re.search(r"(Config|Options|Settings|Args|Sampling|Plan)$", node.name)
        ours = named or _inside(module.name, "arra.config", "arra.cli")
        if ours and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            yield module, node


def test_every_option_is_read() -> None:
    """A flag that nobody reads is a bug: each field is read beyond its own validation."""
    read: set[str] = set()
    for module in MODULES:
        validation = {
            id(inner)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        read |= {
            node.attr
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in validation
        }
    unread = [
        f"{module.where(item)} {node.name}.{item.target.id}"
        for module, node in _options()
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if item.target.id not in read
    ]
    assert not unread, "nobody reads\n" + "\n".join(unread)


# ---- light, lean, and free of extras ------------------------------------------------------------


def _python(code: str) -> str:
    """Runs code in a fresh interpreter; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "matplotlib", "pyarrow", "datasets", "tensorboard")


def test_import_is_light() -> None:
    code = f"import sys, arra; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    assert _python(code) == "", "`import arra` loads these at once"


@pytest.mark.skipif("arra.train.loop" not in NAMES, reason="there is no training loop yet")
def test_training_never_imports_an_encoder() -> None:
    code = (
        "import sys, arra.train.loop, arra.data.loader, arra.data.shards\n"
        "print(*(m for m in sys.modules if m.startswith('arra.encoders')))"
    )
    assert _python(code) == ""


def test_no_extra_is_needed_to_import() -> None:
    """Every module imports with all packages of the extras absent, and prints nothing."""
    absent = (
        "torchvision timm open_clip torch_fidelity accelerate datasets scipy torchmetrics peft "
        "bitsandbytes ray upath wandb trackio"
    )
    names = sorted(NAMES - {"arra.__main__"})
    code = (
        "import importlib, sys\n"
        f"for name in {absent.split()!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )
    assert _python(code) == ""


# ---- frozen surfaces ----------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_flags_and_public_names_are_frozen() -> None:
    """Renaming or dropping one breaks somebody: renew the lists and say so in CHANGELOG.md."""
    script = ROOT / "tests" / "golden" / "write.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docs_name_what_exists() -> None:
    """`file.py:name` in the docs is a definition in that file, `file.py` is a file."""
    wrong = []
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        for file, name in re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page.read_text()):
            path = next((p for p in (SRC / file, ROOT / file) if p.is_file()), None)
            defined = set()
            for node in ast.walk(ast.parse(path.read_text())) if path else ():
                if isinstance(node, ast.ClassDef):
                    inner = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
                    defined |= {node.name, *(f"{node.name}.{n}" for n in inner)}
                elif isinstance(node, ast.FunctionDef):
                    defined.add(node.name)
            if path is None or (name and name not in defined):
                wrong.append(f"{page.name}: {file}:{name}")
    assert not wrong, "the docs name what does not exist: " + ", ".join(wrong)


def test_docs_use_flags_that_exist() -> None:
    known = (ROOT / "tests" / "golden" / "cli.txt").read_text().split("\n")
    wrong = []
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text().replace("\\\n", " ")
        for verb, rest in re.findall(r"\barra ((?:tokenizer |bench )?[a-z]+)\b([^\n`]*)", text):
            # `doctor --plan RECIPE` takes the recipe's own flags as well.
            commands = {"train": ["train scenes"], "doctor": ["doctor", "train scenes"]}
            action = rest.split()[:1]  # of `arra evaluate ACTION`
            commands["evaluate"] = [" ".join([verb, *action]), verb]
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", rest):
                if not any(f"{c} {flag}" in known for c in commands.get(verb, [verb])):
                    wrong.append(f"{page.name}: arra {verb} {flag}")
    assert not wrong, "\n".join(wrong)


# ---- form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_docstring_opens_every_module(name: str) -> None:
    module = next(m for m in MODULES if m.name == name)
    if module.tree.body:
        assert ast.get_docstring(module.tree), f"{name} does not say what it is for"


def test_public_functions_are_typed() -> None:
    wrong = []
    for module in MODULES:
        for node in module.tree.body:
            scope = node.body if isinstance(node, ast.ClassDef) else [node]
            for item in scope:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                    arguments = [*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs]
                    bare = [a.arg for a in arguments if a.annotation is None]
                    bare = [a for a in bare if a not in ("self", "cls")]
                    if bare or item.returns is None:
                        wrong.append(f"{module.where(item)} {item.name}({', '.join(bare)})")
    assert not wrong, "no type hints:\n" + "\n".join(wrong)
