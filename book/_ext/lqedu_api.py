"""API pages from the sources, by reading them: nothing of lqedu (or torch) is imported, so rendering needs neither.

``.. lqedu-api:: lqedu.rounding`` documents what the package lists in ``__all__``, each name under the address a reader
imports it from. ``.. lqedu-entry-points::`` documents the functions of ``lqedu`` itself, in a sentence each.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

ROOT = Path(__file__).resolve().parents[2]
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """A parsed source file: what it defines, and where the names it imports come from."""

    name: str
    path: Path
    lines: list[str]
    tree: ast.Module
    imported: dict[str, str]  # local name -> dotted address

    @property
    def definitions(self) -> dict[str, ast.stmt]:
        """Top-level functions, classes and assigned names."""
        found: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, (*_FUNCTION, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node
        return found


@cache  # a build asks for the same file hundreds of times
def read_module(name: str) -> Module | None:
    """Parse ``lqedu.x.y`` or ``lqedu_kernels.x``; ``None`` if there is no such module in the repository."""
    base = (ROOT / "kernels" if name.startswith("lqedu_kernels") else ROOT).joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            imported = {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module and not node.level
                for alias in node.names
            }
            return Module(name, path, text.splitlines(), tree, imported)
    return None


def public_names(module: Module) -> list[str]:
    """``__all__``, or else every public function and class defined in the file."""
    listed = module.definitions.get("__all__")
    if isinstance(listed, ast.Assign):
        return sorted(ast.literal_eval(listed.value), key=str.lower)
    return [n for n, node in module.definitions.items() if isinstance(node, (*_FUNCTION, ast.ClassDef)) and n[0] != "_"]


def packages() -> list[str]:
    """Every public package (or single module) below ``lqedu`` that has something to document."""
    found = []
    for path in sorted((ROOT / "lqedu").iterdir()):
        if path.name[0] != "_" and (path.suffix == ".py" or (path / "__init__.py").is_file()):
            found.append(f"lqedu.{path.stem}")
    return found


def find(address: str) -> tuple[Module, ast.stmt] | None:
    """The module and node that define ``lqedu.package.name``, through re-exports."""
    for _ in range(5):
        module = read_module(address.rpartition(".")[0])
        name = address.rpartition(".")[2]
        if module is None:
            return None
        if name in module.definitions:
            return module, module.definitions[name]
        if name not in module.imported:
            return None
        address = module.imported[name]
    return None


@cache
def public_addresses() -> dict[str, str]:
    """Where each documented object is defined -> the address it is documented under."""
    found = {}
    for package in packages():
        module = read_module(package)
        for name in public_names(module) if module else ():
            if hit := find(f"{package}.{name}"):
                found[f"{hit[0].name}.{name}"] = f"{package}.{name}"
    return found


class _Writer:
    """Turns definitions into reStructuredText."""

    def __init__(self, config: object, addresses: dict[str, str]) -> None:
        self.config, self.addresses = config, addresses

    def annotation(self, node: ast.expr | None, module: Module) -> str:
        """Source of an annotation in which names of lqedu carry their public address, so that they become links."""
        if node is None:
            return ""
        addresses = self.addresses

        class Qualify(ast.NodeTransformer):
            def visit_Name(self, name: ast.Name) -> ast.expr:
                address = module.imported.get(name.id, f"{module.name}.{name.id}")
                return ast.parse(addresses.get(address, name.id), mode="eval").body

            def visit_Constant(self, constant: ast.Constant) -> ast.expr:
                if not isinstance(constant.value, str):
                    return constant
                return self.visit(ast.parse(constant.value, mode="eval").body)  # a forward reference

            def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
                if ast.unparse(node.value) == "Annotated":  # what follows the type is for a command line
                    return self.visit(node.slice.elts[0])
                return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)

        return ast.unparse(Qualify().visit(ast.parse(ast.unparse(node), mode="eval").body))

    def signature(self, node: ast.FunctionDef, module: Module, *, method: bool = False) -> str:
        arguments = node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
        parts = [self._parameter(a, d, module) for a, d in zip(plain, defaults, strict=True)]
        if method and parts and not any(_decorator(d) == "staticmethod" for d in node.decorator_list):
            parts = parts[1:]
        if arguments.vararg:
            parts.append("*" + self._parameter(arguments.vararg, None, module))
        elif arguments.kwonlyargs:
            parts.append("*")
        parts += [
            self._parameter(a, d, module) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        ]
        if arguments.kwarg:
            parts.append("**" + self._parameter(arguments.kwarg, None, module))
        returns = self.annotation(node.returns, module)
        return f"({', '.join(parts)})" + (f" -> {returns}" if returns else "")

    def _parameter(self, argument: ast.arg, default: ast.expr | None, module: Module) -> str:
        annotation = self.annotation(argument.annotation, module)
        text = f"{argument.arg}: {annotation}" if annotation else argument.arg
        if default is None:
            return text
        return f"{text} = {ast.unparse(default)}" if annotation else f"{text}={ast.unparse(default)}"

    def docstring(self, text: str | None, *, what: str) -> list[str]:
        return GoogleDocstring(cleandoc(text or ""), self.config, what=what).lines()

    def function(self, address: str, module: Module, node: ast.FunctionDef) -> Iterator[str]:
        yield f".. py:function:: {address}{self.signature(node, module)}"
        yield from _canonical(address, f"{module.name}.{node.name}")
        yield from _indented(self.docstring(ast.get_docstring(node), what="function"))

    def class_(self, address: str, module: Module, node: ast.ClassDef) -> Iterator[str]:
        dataclass_ = any(_decorator(d) == "dataclass" for d in node.decorator_list)
        init = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
        signature = ""
        if dataclass_:
            fields = [
                f for f in node.body if isinstance(f, ast.AnnAssign) and "ClassVar" not in ast.unparse(f.annotation)
            ]
            signature = f"({', '.join(self._field(f, module) for f in fields)})"
        elif init:
            signature = self.signature(init, module, method=True).partition(" -> ")[0]
        kind = "exception" if node.name.endswith("Error") else "class"
        yield f".. py:{kind}:: {address}{signature}"
        yield from _canonical(address, f"{module.name}.{node.name}")
        bases = [self.annotation(base, module) for base in node.bases]
        if known := [f":py:class:`{b}`" for b in bases if b.startswith("lqedu.")]:
            yield from _indented([f"Bases: {', '.join(known)}", ""])
        yield from _indented(self.docstring(ast.get_docstring(node), what="class"))
        for member in node.body:
            yield from _indented(list(self.member(member, module)))

    def _field(self, field: ast.AnnAssign, module: Module) -> str:
        annotation = self.annotation(field.annotation, module)
        plain = field.value is None or (isinstance(field.value, ast.Call) and "factory" in ast.unparse(field.value))
        return f"{field.target.id}: {annotation}" + ("" if plain else f" = {ast.unparse(field.value)}")

    def member(self, node: ast.stmt, module: Module) -> Iterator[str]:
        """A documented public method or property, or a constant with a ``#:`` comment above it."""
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and ast.get_docstring(node):
            decorators = {_decorator(d) for d in node.decorator_list}
            if decorators & {"property", "cached_property"}:
                yield f".. py:property:: {node.name}"
                if node.returns:
                    yield f"   :type: {self.annotation(node.returns, module)}"
            else:
                yield f".. py:method:: {node.name}{self.signature(node, module, method=True)}"
                yield from (f"   :{d}:" for d in sorted(decorators & {"classmethod", "staticmethod"}))
            yield ""
            yield from _indented(self.docstring(ast.get_docstring(node), what="method"))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            comment = _comment_above(module, node.lineno)
            if comment:
                yield f".. py:attribute:: {node.targets[0].id}"
                yield f"   :value: {ast.unparse(node.value)}"
                yield ""
                yield from _indented(comment)

    def data(self, address: str, module: Module, node: ast.stmt) -> Iterator[str]:
        yield f".. py:data:: {address}"
        value = ast.unparse(node.value) if getattr(node, "value", None) else ""
        if value and len(value) <= 80:
            yield f"   :value: {value}"
        yield ""
        yield from _indented(_comment_above(module, node.lineno))

    def any(self, address: str) -> Iterator[str]:
        hit = find(address)
        if hit is None:
            raise ValueError(f"{address} is listed in __all__ but no file of the repository defines it")
        module, node = hit
        kinds = {ast.FunctionDef: self.function, ast.ClassDef: self.class_}
        yield from kinds.get(type(node), self.data)(address, module, node)
        yield ""


def _decorator(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2]


def _canonical(address: str, defined: str) -> Iterator[str]:
    if defined != address:
        yield f"   :canonical: {defined}"
    yield ""


def _comment_above(module: Module, line: int) -> list[str]:
    above = []
    while line >= 2 and module.lines[line - 2].strip().startswith("#:"):
        line -= 1
        above.append(module.lines[line - 1].strip().removeprefix("#:").strip())
    return above[::-1]


def _indented(lines: list[str]) -> Iterator[str]:
    yield from (f"   {line}" if line else "" for line in lines)
    yield ""


class _Directive(SphinxDirective):
    def render(self, lines: list[str], sources: list[Path]) -> list[nodes.Node]:
        for source in sources:
            self.env.note_dependency(str(source))
        self.env.note_dependency(__file__)
        container = nodes.section()
        container.document = self.state.document
        nested_parse_with_titles(self.state, StringList(lines, source=str(sources[0])), container)
        return container.children


class Api(_Directive):
    """``.. lqedu-api:: package``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        module = read_module(package)
        if module is None:
            raise self.error(f"there is no module {package}")
        writer = _Writer(self.config, public_addresses())
        lines = [*writer.docstring(ast.get_docstring(module.tree), what="module"), ""]
        for name in public_names(module):
            lines += writer.any(f"{package}.{name}")
        sources = list(module.path.parent.glob("*.py")) if module.path.name == "__init__.py" else [module.path]
        return self.render(lines, sources)


class EntryPoints(_Directive):
    """``.. lqedu-entry-points::``: the functions that ``lqedu`` offers directly."""

    def run(self) -> list[nodes.Node]:
        module = read_module("lqedu")
        writer = _Writer(self.config, public_addresses())
        home = ast.literal_eval(module.definitions["_HOME"].value)
        lines = []
        for name, package in home.items():
            defined, node = find(f"{package}.{name}")
            documented = writer.addresses.get(f"{defined.name}.{name}", f"{package}.{name}")
            summary = re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0].splitlines()
            target = f"In full: :py:func:`{documented}`." if documented in writer.addresses.values() else ""
            lines += [f".. py:function:: lqedu.{name}{writer.signature(node, defined)}", ""]
            lines += [*_indented([*summary, "", target]), ""]
        return self.render(lines, [module.path])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("lqedu-api", Api)
    app.add_directive("lqedu-entry-points", EntryPoints)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
