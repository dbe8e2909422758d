"""The catalogue of methods: a decorator declares each method once, at its function.

    @method(
        family="modules", paper="arXiv:2106.09685", where="eq. 3", differs="a low-rank update beside dense layers",
        claim="few_shot: LoRA above zero-shot",
    )
    def lora(model: nn.Module, *, rank: int = 4) -> Recipe: ...

A method has the name of its function. Its options are the keyword-only arguments. Declarations are read by `ast`: their
arguments are literals, and listing methods imports no JAX. A function is imported at its first use.
"""

import ast
import difflib
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlm_jax import config
from vlm_jax.errors import UserError

PACKAGE = Path(__file__).parent
_CONFIGS = (PACKAGE / "configs", PACKAGE.with_name("configs"))  # in a wheel, in the repository
CONFIGS = next(filter(Path.is_dir, _CONFIGS))
VERDICTS = PACKAGE / "verdicts.json"  # study -> claim -> verdict, written by experiments/study.py
_OWN: dict[tuple[str, str], Callable] = {}  # (family, name) -> a method declared outside the package


class Family(NamedTuple):
    """Properties shared by all methods of one family.

    Attributes:
      kind: the namespace of the names; names of one kind are unique.
      takes: inputs and outputs of the functions.
      run: how to use a method; `{name}` stands for its name.
    """

    kind: str
    takes: str
    run: str


def _adapts(takes: str) -> Family:
    return Family("adaptation", takes, "vlm-jax adapt --method={name}")


def _part(kind: str, takes: str, key: str) -> Family:
    return Family(kind, takes, f"--config.{key}={{name}}")


FAMILIES = {
    "recipes": Family("recipe", "variant -> config", "vlm-jax train --config={name}"),
    "models": _part("model", "sections of its parts -> module", "model.name"),
    "mlps": _part("mlp", "-> Part, from fields of Mlp to a module", "model.image.mlp"),
    "spaces": _part("space", "-> Part, from `Encoded` of both towers to embeddings", "model.space"),
    "ops": Family("op", "example, perhaps with a generator -> example", "{name}(...) in config.data.ops"),
    "terms": _part("term", "model -> Term, or Objective", "objective.name"),
    "similarities": _part("similarity", "-> Similarity", "objective.similarity"),
    "targets": _part("targets", "-> Targets", "objective.targets"),
    "negatives": _part("negatives", "-> Negatives", "objective.negatives"),
    "penalties": _part("penalty", "-> Penalty", "objective.penalty"),
    "corruptions": _part("corruption", "-> corrupt(targets, lengths, decoder, keys)", "objective.corruption"),
    "selections": Family("selection", "model -> Selection", "--config.objective.selections.chosen.name={name}"),
    "combinations": _part("combination", "-> combine({term: gradients}, parameters)", "objective.combine"),
    "heads": _adapts("features, labels, text, scale -> head"),
    "parameters": _adapts("model -> Recipe"),
    "modules": _adapts("model -> Recipe"),
    "prompts": _adapts("model -> Recipe"),
    "acquisitions": Family(
        "acquisition", "-> acquire(seen, count, rng), rows of a pool", "vlm-jax adapt --budget=64 --acquisition={name}"
    ),
    "insertions": Family("insertion", "fields -> record", "--config.model.insertions=[dict(type='{name}')]"),
    "retrieval": Family("retrieval", "features, texts, scale -> head", "vlm_jax.adapt.retrieval.{name}"),
    "continual": Family("continual", "model, recipe, tasks -> experts", "vlm_jax.adapt.continual.{name}"),
    "growth": Family("growth", "parameters, fresh ones of a larger model -> its own", "vlm_jax.params.growth.{name}"),
    "averages": Family("average", "parameter trees -> parameters", "vlm_jax.params.averages.{name}"),
    "regularizers": Family("regularizer", "parameters, pretrained ones", "vlm_jax.params.regularizers.{name}"),
    "evaluators": Family("evaluator", "data -> evaluator", "vlm-jax evaluate --task={name}"),
}


class Declaration(NamedTuple):
    """A method, read from its decorator and its signature.

    Attributes:
      name: the function's name; a recipe has the name of its file.
      family: a key of `FAMILIES`.
      differs: what the method changes, in a few words.
      paper: "arXiv:..." or another reference; "" without a paper.
      where: section or equation of the paper.
      claim: "study: row", a row of `verdicts.json`; "" if no study tests a claim of the method.
      system: name of the published system, if it differs from `name`.
      module, function: what to import.
      path, line: place of the declaration; the path is relative to the package's parent.
      needs: config key -> value; the method does not run without these values.
      count: number of parameters that train, a formula of the options and of D_t, D_v (widths of the text and image
        tower), L_t, L_v (depths of the two towers), H_t, H_v (their heads) and E (width of the embeddings); "" if the
        paper claims no number.
      identity: whether the adapted model is the base model before it is trained.
      options: keyword-only argument -> its default, as source text.
    """

    name: str
    family: str
    differs: str
    paper: str
    where: str
    claim: str
    system: str
    needs: Mapping[str, Any]
    count: str
    identity: bool
    module: str
    function: str
    path: str
    line: int
    options: Mapping[str, str]

    @property
    def run(self) -> str:
        """The command line or the option that uses the method."""
        run = FAMILIES[self.family].run.format(name=self.name)
        needs = [f"--config.{key}={value}" for key, value in self.needs.items() if run.startswith("--config")]
        return " ".join([run, *needs])

    @property
    def verdict(self) -> str:
        """The study's verdict on the claim; "" without a claim."""
        study, _, row = self.claim.partition(": ")
        return _verdicts()[study][row] if study else ""

    @property
    def test(self) -> str:
        """The test under the same path in tests/, for the file or an enclosing folder; "" if there is no test."""
        path = PurePosixPath(self.path.removesuffix("/__init__.py"))
        for near in (path, *path.parents[:-2]):
            test = PurePosixPath("tests", *near.parent.parts[1:], f"test_{near.stem}.py")
            if (PACKAGE.parent / test).is_file():
                return str(test)
        return ""

    def load(self) -> Callable:
        """Imports and returns the function."""
        return getattr(importlib.import_module(self.module), self.function)


def method(
    *,
    family: str,
    differs: str,
    paper: str = "",
    where: str = "",
    claim: str = "",
    system: str = "",
    needs: Mapping[str, Any] | None = None,
    count: str = "",
    identity: bool = False,
) -> Callable[[Callable], Callable]:
    """Declares a function as a method and returns the function unchanged.

    The arguments are literals, see `Declaration`. A function outside the package, e.g. in a notebook or in your own
    file, is registered for this process and overrides a method of the same name.
    """

    def declare(function):
        if family != "recipes" and not function.__module__.startswith("vlm_jax."):
            _OWN[family, function.__name__] = function
        return function

    return declare


def of(*families: str) -> dict[str, Declaration]:
    """Returns `{name: declaration}` of some families, ordered by family, file and line.

    Raises:
      UserError: there is no such family; a declaration is wrong, see `read`.
    """
    for family in families:
        if family not in FAMILIES:
            raise UserError(unknown(f"there is no family `{family}`", family, FAMILIES))
    return {d.name: d for family in families for d in read() if d.family == family}


def family(families: tuple[str, ...], name: str) -> str | None:
    """Returns which of some families has a method, your own methods first; None if none has it."""
    own = [family for family in families if (family, name) in _OWN]
    return own[0] if own else next((family for family in families if name in of(family)), None)


def get(families: str | tuple[str, ...], name: str, where: str) -> Callable:
    """Returns the function of a method.

    Args:
      families: families to look in.
      name: name of the method.
      where: name of the choice in messages, e.g. "config.objective.penalty".

    Raises:
      UserError: none of the families has the name.
    """
    families = (families,) if isinstance(families, str) else families
    if own := [_OWN[family, name] for family in families if (family, name) in _OWN]:
        return own[0]
    known = of(*families)
    if name not in known:
        raise UserError(unknown(f"{where} is `{name}`", str(name), known))
    return known[name].load()


def build(family: str, spec: str | Mapping[str, Any], where: str, **fixed: Any) -> Any:
    """Builds a part from its name, or from a dict with its name and arguments.

    Args:
      family: the part's family.
      spec: "softmax", or dict(name="softmax", label_smoothing=0.1).
      where: name of the section in messages, e.g. "config.objective.penalty".
      **fixed: arguments from the caller; the section may not set them.

    Raises:
      UserError: the family has no such name, or the part does not take an argument.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    function = get(family, name, where if isinstance(spec, str) else f"{where}.name")
    return config.call(function, arguments, where, **fixed)


def unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    """Returns the error message for a name that is not in `known`."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean `{close[0]}`?)" if close else ""
    return (
        f"{what}{hint}" if close and len(known) > 12 else f"{what}; expected one of: {', '.join(known) or 'none'}{hint}"
    )


@functools.cache
def read() -> tuple[Declaration, ...]:
    """Returns all declarations of the package and of the recipes in configs/.

    Raises:
      UserError: an argument is not a literal, a family or a claim does not exist, or two methods share a name.
    """
    found: dict[tuple[str, str], Declaration] = {}
    for folder, package in ((PACKAGE, "vlm_jax"), (CONFIGS, "configs")):
        for path in sorted(folder.rglob("*.py")):
            if folder is PACKAGE and path.is_relative_to(CONFIGS):
                continue
            for declaration in _of_file(path, folder, package):
                key = FAMILIES[declaration.family].kind, declaration.name
                if key in found:
                    first, second = (f"{d.path}:{d.line}" for d in (found[key], declaration))
                    raise UserError(f"two methods are called `{key[1]}`, in {first} and {second}; rename one")
                found[key] = declaration
    return tuple(sorted(found.values(), key=lambda d: (list(FAMILIES).index(d.family), d.path, d.line)))


def _of_file(path: Path, folder: Path, package: str) -> list[Declaration]:
    text = path.read_text(encoding="utf-8")
    if "method(" not in text:
        return []
    module = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
    place, declarations = f"{package}/{path.relative_to(folder).as_posix()}", []
    for node in ast.parse(text).body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func).removeprefix("catalogue.") == "method":
                declarations.append(_declaration(node, call, module, place))
    return declarations


def _declaration(node: Any, call: ast.Call, module: str, place: str) -> Declaration:
    where = f"{place}:{node.lineno}: @method of `{node.name}`"
    try:
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        method(*call.args, **given)
    except ValueError:
        raise UserError(f"{where} has an argument that is no literal; write its value") from None
    except TypeError as error:
        raise UserError(f"{where}: {str(error).removeprefix('method() ')}") from None
    fields = (
        dict.fromkeys(("paper", "where", "claim", "system", "count"), "") | {"needs": {}, "identity": False} | given
    )
    if fields["family"] not in FAMILIES:
        raise UserError(unknown(f"{where} names no family: `{fields['family']}`", fields["family"], FAMILIES))
    study, _, row = fields["claim"].partition(": ")
    if study and row not in _verdicts().get(study, {}):
        rows = [f"{study}: {row}" for study, rows in _verdicts().items() for row in rows]
        raise UserError(
            unknown(f"{where}: no study has the claim `{fields['claim']}`", fields["claim"], dict.fromkeys(rows))
        )
    if isinstance(node, ast.ClassDef):  # a record, whose fields are the options
        pairs = [(field.target.id, field.value) for field in node.body if isinstance(field, ast.AnnAssign)]
    else:
        pairs = zip((argument.arg for argument in node.args.kwonlyargs), node.args.kw_defaults, strict=True)
    options = {name: "" if default is None else ast.unparse(default) for name, default in pairs}
    name = place.rpartition("/")[2].removesuffix(".py") if fields["family"] == "recipes" else node.name
    return Declaration(
        name=name, module=module, function=node.name, path=place, line=node.lineno, options=options,
        **fields,
    )  # fmt: skip


@functools.cache
def _verdicts() -> dict[str, dict[str, str]]:
    return json.loads(VERDICTS.read_text(encoding="utf-8"))
