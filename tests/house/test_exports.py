"""Each module says what it offers, offers what it says, and the façade keeps its promise."""

import ast

import pytest

import corolla


def bound_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def exports(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_each_public_module_lists_all_that_it_defines_for_others(modules):
    wrong = {}
    for path, tree in modules.items():
        if path.endswith("__main__.py"):
            continue
        defined = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_"
        }
        if missing := defined - set(exports(tree) or []):
            wrong[path] = sorted(missing)
    assert not wrong, f"public, but not in __all__: {wrong}"


def test_each_exported_name_exists(modules):
    wrong = {}
    for path, tree in modules.items():
        if missing := set(exports(tree) or []) - bound_names(tree):
            wrong[path] = sorted(missing)
    assert not wrong, f"in __all__, but not defined: {wrong}"


def test_each_room_is_entered_through_a_facade_that_lists_its_names(modules):
    silent = [
        path
        for path, tree in modules.items()
        if path.endswith("__init__.py")
        and exports(tree) is None
        and any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
    ]
    assert not silent, f"imports without __all__: {silent}"


@pytest.mark.parametrize("name", [name for name in corolla.__all__ if name != "__version__"])
def test_the_facade_finds_each_name_where_it_says(name, modules):
    home = corolla._HOMES[name]
    path = home.removeprefix("corolla.").replace(".", "/")
    tree = modules.get(f"{path}.py") or modules.get(f"{path}/__init__.py")
    if tree is None:
        pytest.skip(f"{home} is not built yet")
    assert name == path or name in (exports(tree) or [])


def test_the_facade_refuses_other_names():
    with pytest.raises(AttributeError, match="no attribute 'RemoteModel'"):
        _ = corolla.RemoteModel


def test_a_missing_torch_is_answered_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(corolla._HOMES, "Swarm", "torch_that_is_not_installed")
    with pytest.raises(
        ImportError, match=r"needs the package torch_that_is_not_installed.*pip install 'corolla\[torch\]'"
    ):
        _ = corolla.Swarm
