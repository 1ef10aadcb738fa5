"""Errors of Hydra and OmegaConf in one sentence: what is wrong, where, and what is allowed."""

import re
import shlex
from contextlib import suppress
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException

from qat_runner.config.allowed import unknown_key
from qat_runner.config.composing import quoted
from qat_runner.config.model_names import PREFIXES
from qat_runner.wording import one_of


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
            words = [f"{prefix}/NAME" for prefix in PREFIXES]
            return f"model={option}: {one_of(option, (*_options('model', configs), *words))}"
        options = _options(group, configs) if group else []
        if not options:  # Hydra's own groups, or --config-name
            return f"there is no config {error.missing_cfg_file}; is a plugin of Hydra missing?"
        return f"{group}={option}: {one_of(option, options)}"
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
            return unknown_key(key)
    if match := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", f"{text} {detail}"):
        key = re.search(r"(?:override|full_key:) ?([\w.]+)", f"{text} {detail}")
        return f"{key[1] if key else 'a value'}={match[1]}: must be {_KINDS.get(match[2], match[2])}"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*?)\]", f"{text} {detail}"):
        key = re.search(r"(?:override|full_key:) ?([\w.]+)", f"{text} {detail}")
        return f"{key[1] if key else 'a value'}={match[1]}: {one_of(match[1], match[2].split(', '))}"
    if match := re.search(r"Error merging override (([\w.]+)=(\S+)).*str is not a ListConfig", f"{text} {detail}"):
        return f"{match[1]}: must be a list: {match[2]}=[{match[3]}]"
    if match := re.search(r"Error merging override (\S+)", text):
        return f"{match[1]}: {re.sub(r' full_key:.*', '', detail)}"
    return re.sub(r"\s*(full_key:|See https?:).*", "", text)


def _options(group: str, configs: Path) -> list[str]:
    """Return the options of a group: those that are shipped, and those of installed packages."""
    shipped = {path.stem for path in (configs / group).glob("*.yaml")}
    with suppress(OSError):  # the group is only in files
        shipped |= {name.removesuffix(".yaml") for name in ConfigStore.instance().list(group) if name.endswith(".yaml")}
    return sorted(shipped)


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
