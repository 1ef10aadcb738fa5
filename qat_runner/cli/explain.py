"""Errors of Hydra and OmegaConf in one sentence: what is wrong, where, and what is allowed."""

import re
import shlex
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException

from qat_runner.config.composing import NOT_TYPED, quoted
from qat_runner.config.model_names import PREFIXES
from qat_runner.config.schema import ConfigSchema
from qat_runner.wording import meant


def explain(error: Exception, configs: Path) -> str:
    """Return one sentence that explains an error of Hydra or OmegaConf.

    Args:
        error: the exception.
        configs: the folder of the shipped configs, whose groups and options are the allowed ones.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher":
            return (
                f"{group}={option}: there is no such launcher; is a plugin missing (pip install 'qat_runner[slurm]' or "
                f"'qat_runner[joblib]')?"
            )
        if error.missing_cfg_file.startswith("model/"):
            option = error.missing_cfg_file.removeprefix("model/")
            names = sorted(path.stem for path in (configs / "model").glob("*.yaml"))
            words = [f"{prefix}/NAME" for prefix in PREFIXES]
            return f"model={option}: must be one of {', '.join((*names, *words))}{meant(option, names)}"
        options = sorted(path.stem for path in (configs / group).glob("*.yaml")) if group else []
        if not options:  # Hydra's own groups, or --config-name
            return f"there is no config {error.missing_cfg_file}; is a plugin of Hydra missing?"
        return f"{group}={option}: must be one of {', '.join(options)}{meant(option, options)}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override and not error.override.startswith("~"):
            return f"{error.override}: must be KEY=VALUE; qat-run --help lists all keys and flags"
        if sentence := _how_to_quote(error.override):
            return sentence
    text = " ".join(str(error).split())
    if match := re.search(r"Ambiguous value for argument '([^=']+)=(.*?)' 1\.", text):
        key, values = match.groups()
        return f"{key}={values}: several values need a sweep, qat-run -m; a list is written {key}=[{values}]"
    cause = error.__cause__ or error.__context__
    detail = " ".join(str(cause).split()) if cause else ""
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        if (
            "not in struct" in f"{text} {detail}"
            or "not in '" in f"{text} {detail}"
            or "No match in the defaults list" in text
        ):
            if (configs / key).is_dir():
                return f"unknown key '{key}'; did you mean +{key}=NAME?"
            known = [name for name in _keys(ConfigSchema) if name.partition(".")[0] not in NOT_TYPED]
            return f"unknown key '{key}'{meant(key, known) or '; qat-run --help lists all keys'}"
    if match := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", f"{text} {detail}"):
        key = re.search(r"(?:override|full_key:) ?([\w.]+)", f"{text} {detail}")
        return f"{key[1] if key else 'a value'}={match[1]}: must be {_KINDS.get(match[2], match[2])}"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*?)\]", f"{text} {detail}"):
        key = re.search(r"(?:override|full_key:) ?([\w.]+)", f"{text} {detail}")
        return f"{key[1] if key else 'a value'}={match[1]}: must be one of {match[2]}"
    if match := re.search(r"Error merging override (([\w.]+)=(\S+)).*str is not a ListConfig", f"{text} {detail}"):
        return f"{match[1]}: must be a list: {match[2]}=[{match[3]}]"
    if match := re.search(r"Error merging override (\S+)", text):
        return f"{match[1]}: {re.sub(r' full_key:.*', '', detail)}"
    return re.sub(r"\s*(full_key:|See https?:).*", "", text)


def _how_to_quote(override: str) -> str | None:
    """Return a sentence for KEY=VALUE if Hydra's grammar can parse the value only in quotes, otherwise None."""
    key, _, value = override.partition("=")
    suggestion = f"{key}={quoted(value)}"
    with suppress(OverrideParseException):
        if value and OverridesParser.create().parse_override(suggestion).value() == value:
            typed = shlex.quote(suggestion) if re.search(r'["$`\\!]', suggestion) else f'"{suggestion}"'
            return f"{override}: this value must be quoted for Hydra and for the shell: {typed}"
    return None


_KINDS = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "a string"}


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """Return all dotted keys of a dataclass."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        for part in filter(is_dataclass, (hint, *get_args(hint))):  # the arguments cover groups that may be null
            keys += _keys(part, f"{prefix}{name}.")
    return keys
