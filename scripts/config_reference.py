"""Write docs/configuration.md: every key of qat_runner/config/schema.py, and every option of the groups in configs/.

python scripts/config_reference.py [FILE]
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from qat_runner.config import schema

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DEFAULT_FILE = ROOT / "docs" / "configuration.md"

HEAD = """\
# Configuration reference

<!-- Made by `python scripts/config_reference.py` from qat_runner/config/schema.py and configs/: edit those. -->

A run is described by keys. `KEY=VALUE` on the command line sets one, `GROUP=OPTION` chooses a file of `configs/`, which
sets several at once. `qat-run --help` shows the same keys with the values they have by default, and
`qat-run ... --cfg job` the whole config of a command, without running it.

- **Allowed**: `null` stands for "not set", and can be given on the command line, too.
- **Default**: *required* means that the group's option sets it; where an option sets a key, the option wins over the
  default given here.
- A wrong key or value is refused in one sentence, before any work.
"""

SECTIONS: list[tuple[str, str, type, str]] = [
    ("The run", "", schema.ConfigSchema, "These have no prefix: `qat-run bits=4 seed=1`."),
    ("model", "model.", schema.ModelConfig, "The network."),
    ("dataset", "dataset.", schema.DatasetConfig, "The data, and how they are read."),
    ("clipping", "clipping.", schema.ClippingSchema, "How clipping scalars are found."),
    ("gradient", "gradient.", schema.GradientConfig, "How gradients pass through quantization."),
    ("allocation", "allocation.", schema.AllocationConfig, "How bits are chosen, tensor by tensor: [bits](bits.md)."),
    (
        "oscillations",
        "oscillations.",
        schema.OscillationsConfig,
        "Weights that flip between two codes: [recipes](recipes.md#mobilenets-at-few-bits).",
    ),
    ("recipe", "recipe.", schema.RecipeConfig, "How the network is trained, apart from its stages."),
    (
        "A stage of the recipe",
        "recipe.STAGE.",
        schema.StageConfig,
        f"STAGE is one of {', '.join(f'`{stage}`' for stage in schema.STAGES)}; the mode chooses which one is used.",
    ),
]

GROUPS: dict[str, str] = {
    "model": "The network; `resnet18` by default.",
    "dataset": "The data; `digits` by default. The recipe follows from it, unless one is named.",
    "clipping": "How clipping scalars are found; `octav` by default.",
    "gradient": "The gradient estimator; `mph` by default.",
    "recipe": "The option of the data set's name is the default; `imagenet` looks up `paper/MODEL`. "
    "Shown for each stage is what differs from the defaults of [its keys](#a-stage-of-the-recipe).",
    "experiment": "Given as `+experiment=NAME`, with `-m`: the rows of a table.",
    "row": "What the rows of experiments are made of; also by itself, as `+row=NAME`.",
    "stand_in": "Given as `+stand_in=NAME` beside an experiment: the data and the recipe that its rows are put on.",
}


def meanings(cls: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line; fields without one are left out."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[node.target.id] = " ".join(text.split())
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING or field.default == MISSING:
        return "*required*"
    return f"`{_value(field.default)}`"


def _value(value: Any) -> str:
    """As it is written on the command line."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _allowed(field: dataclasses.Field[Any]) -> str:
    """The names that a field may hold, or its type and range."""
    annotation: Any = field.type
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{name}`" for name in annotation.__members__)
    plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    name = (annotation.__name__ if plain else str(annotation)).replace("None", "null").replace(" | ", " or ")
    if "range" not in field.metadata:
        return name
    kind, null, _ = name.partition(" or null")
    return f"{kind}, {field.metadata['range']}" + (f",{null}" if null else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines) + "\n"


def section(title: str, prefix: str, cls: type, intro: str) -> str:
    """A heading and the table of a dataclass's own keys."""
    said = meanings(cls)
    rows = [
        [f"`{prefix}{field.name}`", _allowed(field), _default(field), said.get(field.name, "")]
        for field in dataclasses.fields(cls)
        if not _is_section(field)
    ]
    return f"## {title}\n\n{intro}\n\n{_table(['key', 'allowed', 'default', 'meaning'], rows)}"


def _is_section(field: dataclasses.Field[Any]) -> bool:
    """Whether the field is a group of keys, which has a table of its own."""
    return any(cls.__name__ in str(field.type) for _, _, cls, _ in SECTIONS)


def _comment(text: str) -> str:
    """The comment at the head of a file."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    return " ".join(head)


def _settings(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """key=value of all that a file sets, and GROUP=OPTION of the groups that it overrides; not its name."""
    for key, value in content.items():
        if key == "defaults":
            chosen = [entry for entry in value if isinstance(entry, dict)]
            yield from (
                f"`{group.removeprefix('override /')}={option}`"
                for entry in chosen
                for group, option in entry.items()
                if group.startswith("override /")
            )
        elif isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "name":
            yield f"`{prefix}{key}={_value(value)}`"


def group(name: str, intro: str) -> str:
    """A heading and the table of a group's options; of a recipe, a row for each stage."""
    rows = []
    for path in sorted((CONFIGS / name).rglob("*.yaml")):
        text = path.read_text()
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        option = path.relative_to(CONFIGS / name).with_suffix("").as_posix()
        stages = {key: content.pop(key) for key in schema.STAGES if key in content} if name == "recipe" else {}
        rows.append([f"`{option}`", _comment(text), " ".join(_settings(content))])
        rows += [["", stage, " ".join(_settings(_changed(settings)))] for stage, settings in stages.items()]
    return f"### {name}\n\n{intro}\n\n{_table(['option', 'what', 'sets'], rows)}"


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """What a stage sets to another value than the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(schema.StageConfig)}
    return {key: value for key, value in settings.items() if value != defaults[key]}


def reference() -> str:
    """The whole page."""
    keys = [section(*arguments) for arguments in SECTIONS]
    groups = [group(name, intro) for name, intro in GROUPS.items()]
    launchers = "Hydra's own groups work as well: `hydra/launcher=slurm` and `joblib`, see [clusters](clusters.md).\n"
    return "\n".join([HEAD, *keys, "## Groups and their options\n", *groups, launchers])


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FILE
    out.write_text(reference())
    print(out)
