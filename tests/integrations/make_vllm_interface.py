"""Write vllm_interface.json: the names and arguments of vLLM that our plugin relies on, read from vLLM's own sources.

    pip download --no-deps vllm==0.33.0 && python tests/integrations/make_vllm_interface.py vllm-0.33.0-*.whl

Nothing is installed or imported: files of the wheel are parsed.
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

OUT = Path(__file__).with_name("vllm_interface.json")
WANTED = {  # file -> classes and functions
    "vllm/model_executor/layers/quantization/base_config.py": ("QuantizeMethodBase", "QuantizationConfig"),
    "vllm/model_executor/layers/quantization/__init__.py": ("register_quantization_config",),
    "vllm/model_executor/layers/linear.py": (
        "LinearMethodBase", "LinearBase", "UnquantizedLinearMethod", "register_weight_loader_v2_supported_method",
    ),
    "vllm/model_executor/parameter.py": (
        "BasevLLMParameter", "_ColumnvLLMParameter", "RowvLLMParameter", "ChannelQuantScaleParameter",
        "GroupQuantScaleParameter", "PackedvLLMParameter", "ModelWeightParameter",
    ),
    "vllm/plugins/__init__.py": ("load_general_plugins",),
}  # fmt: skip


def describe(wheel: Path) -> dict:
    """Bases, abstract methods and arguments of each wanted class, arguments of each function."""
    with zipfile.ZipFile(wheel) as archive:
        result: dict = {"version": wheel.name.split("-")[1]}
        for file, names in WANTED.items():
            tree = ast.parse(archive.read(file).decode())
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            nodes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            groups = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body
                      if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                      and node.targets[0].id == "DEFAULT_PLUGINS_GROUP"}  # fmt: skip
            result[module] = {name: _class(nodes[name]) if isinstance(nodes[name], ast.ClassDef)
                              else {"arguments": _arguments(nodes[name])} for name in names} | groups  # fmt: skip
    return result


def _class(node: ast.ClassDef) -> dict:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "abstract": [m.name for m in methods if "abstractmethod" in map(ast.unparse, m.decorator_list)],
        "methods": {m.name: _arguments(m) for m in methods if not m.decorator_list or _is_plain(m)},
    }


def _is_plain(method: ast.FunctionDef) -> bool:
    return set(map(ast.unparse, method.decorator_list)) <= {"abstractmethod", "classmethod", "staticmethod"}


def _arguments(node: ast.FunctionDef) -> list[str]:
    """Names in order; one that may be left out ends with '='."""
    a = node.args
    names = [arg.arg for arg in [*a.posonlyargs, *a.args]]
    optional = len(a.defaults)
    names = [name + "=" * (index >= len(names) - optional) for index, name in enumerate(names)]
    names += ["*" + a.vararg.arg] if a.vararg else []
    names += [arg.arg + "=" * (default is not None) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return names + (["**" + a.kwarg.arg] if a.kwarg else [])


if __name__ == "__main__":
    OUT.write_text(json.dumps(describe(Path(sys.argv[1])), indent=1) + "\n")
