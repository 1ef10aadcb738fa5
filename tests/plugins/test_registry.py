import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from qat_runner import plugins
from qat_runner.plugins import PluginError, Registry
from tests.plugins.test_installed import installed


def numbers() -> Registry[int]:
    return Registry("number", "tests.numbers", {"one": 1}, valid=lambda thing: isinstance(thing, int))


def test_names_of_ours_are_taken() -> None:
    registry = numbers()
    assert registry.register("two", 1) == 1 and registry.register("two", 2) == 2
    assert list(registry) == ["one", "two"] and len(registry) == 2 and "three" not in registry
    with pytest.raises(ValueError, match="number 'one': this name is taken"):
        registry.register("one", 3)
    del registry["two"]
    assert dict(registry) == {"one": 1}
    with pytest.raises(TypeError, match="'three' is not a valid number: 'drei'"):
        registry["three"] = "drei"  # type: ignore[assignment]
    with pytest.raises(KeyError):
        registry["three"]


def test_what_is_installed_is_imported_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        tmp_path, "[tests.numbers]\nnone = qat_nowhere:NUMBER\ntwo = qat_own_numbers:TWO\nword = qat_own_numbers:WORD\n"
    )
    (tmp_path / "qat_own_numbers.py").write_text("TWO, WORD = 2, 'word'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = numbers()
    assert list(registry) == ["one", "none", "two", "word"] and "none" in registry
    assert [*registry.sound()] == [("one", 1), ("two", 2)]
    assert registry["two"] == 2
    with pytest.raises(PluginError, match="number 'none': qat_nowhere:NUMBER cannot be imported"):
        registry["none"]
    with pytest.raises(PluginError, match="'word' is not a valid number"):
        registry["word"]


def test_what_is_found_by_another_class_is_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """`importlib_metadata`, which trackers import, returns objects of its own classes for the same entry points."""
    foreign = SimpleNamespace(name="theirs", value="math:tau", group="things")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [foreign])
    plugins._on_path.cache_clear()
    try:
        assert Registry[float]("thing", "things", {})["theirs"] == math.tau
    finally:
        plugins._on_path.cache_clear()
