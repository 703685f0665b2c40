"""One word per thing: the code names things in the words of the glossary; and nothing in it can run remote code."""

import ast
import re
from collections.abc import Iterator

# A word that must not name anything, what to say instead, and the rooms where it is another thing's proper name.
FORBIDDEN = {
    "blacklist": ("ban", ()),
    "whitelist": ("the thing that is allowed", ()),
    "cluster": ("swarm", ()),
    "compression": ("codec", ()),
    "dht": ("directory", ("swarm", "cli")),  # BitTorrent's, for meeting the first peer
    "dummy": ("a fake that works; see testing", ()),
    "expert": ("block", ("blocks", "hub")),  # of a mixture
    "helper": ("a concept's name", ()),
    "history": ("log", ("gateway", "cli", "monitor")),  # of a chat, of a swarm
    "layer": ("block", ("blocks", "hub", "client", "tuning")),  # where transformers says so
    "manager": ("what it does", ()),
    "misc": ("a concept's name", ()),
    "node": ("peer, server or client", ("server", "cli")),  # server/node
    "packet": ("frame or message", ()),
    "peft": ("adapter", ("tuning",)),  # its file format
    "route": ("chain", ("gateway", "monitor")),  # of HTTP
    "shard": ("span", ("hub", "testing")),  # a file of a checkpoint
    "user": ("client", ("gateway", "cli")),  # a role in a chat
    "util": ("a concept's name", ()),
    "worker": ("server", ("engine",)),  # engine/worker
}
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load"}


def test_the_code_speaks_the_glossary(modules):
    found = [
        f"{path}: {name!r} says {word!r}; say {FORBIDDEN[word][0]}"
        for path, tree in sorted(modules.items())
        for name in [*path.removesuffix(".py").split("/"), *names_given(tree)]
        for word in words(name)
        if word in FORBIDDEN and path.partition("/")[0] not in FORBIDDEN[word][1]
    ]
    assert not found, "\n".join(sorted(set(found)))


def test_classes_are_named_for_what_they_are(modules):
    classes = [node.name for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if re.match(r"_?(Base|Abstract)[A-Z]", name)] == []


def test_nothing_remote_can_be_run_as_code(modules):
    found = {path: called for path, tree in modules.items() if (called := dangerous(tree))}
    assert not found


def names_given(tree: ast.Module) -> Iterator[str]:
    """Give what this module names itself; the names of other libraries are theirs."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store(), value=ast.Name(id="self")):
                yield node.attr


def words(name: str) -> set[str]:
    """Split a name into words, each in the singular as well."""
    found = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return found | {word.removesuffix("s") for word in found}


def dangerous(tree: ast.Module) -> set[str]:
    """Name the imports and calls by which bytes could become code."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found |= FORBIDDEN_MODULES & {alias.name.partition(".")[0] for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                found |= FORBIDDEN_MODULES & {module.partition(".")[0]}
                found |= FORBIDDEN_CALLS & {f"{module}.{alias.name}" for alias in node.names}
            case ast.Call():
                found |= FORBIDDEN_CALLS & {ast.unparse(node.func)}
                found |= {f"{key.arg}=True" for key in node.keywords if trusts_remote_code(key)}
    return found


def trusts_remote_code(keyword: ast.keyword) -> bool:
    return keyword.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(keyword.value) == "True"


def test_the_rules_notice_what_they_forbid():
    tree = ast.parse(
        "import pickle.x\nfrom torch import load\nclass UserLayers:\n  def f(self, a_shard):\n    self.dht = eval(1)"
    )
    assert {word for name in names_given(tree) for word in words(name)} >= {"user", "layer", "shard", "dht"}
    assert dangerous(tree) == {"pickle", "torch.load", "eval"}
    assert dangerous(ast.parse("f(trust_remote_code=True)")) == {"trust_remote_code=True"}
