"""The faults of tests/mutants apply to the current product."""

import dataclasses

import pytest

from tests.mutants import MUTANTS, TEST_FOLDERS, select_tests
from tests.mutants.mutant import ROOT, Mutant, NotApplicable
from tests.mutants.results import Result, append_result, format_table, read_results, summarize
from tests.mutants.running import judge

EXAMPLE = Mutant(
    "example",
    "sas_megatron.config.section:divisors",
    "number % candidate == 0",
    "number % candidate",
    "An example.",
)


def source_of(mutant: Mutant) -> str:
    return (ROOT / mutant.path).read_text(encoding="utf-8")


@pytest.mark.parametrize("package", TEST_FOLDERS)
def test_every_fault_applies_to_the_current_source(package):
    for mutant in MUTANTS:
        if mutant.package == package:
            source = source_of(mutant)
            mutated = mutant.mutate(source)
            assert mutated != source, mutant.name
            assert len(mutated.splitlines()) == len(source.splitlines()), (
                f"{mutant.name} must change one line"
            )


def test_faults_have_unique_names_and_cover_every_package():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 60
    assert not set(names) & TEST_FOLDERS.keys()
    packages = {path.parent.name for path in ROOT.glob("sas_megatron/*/__init__.py")} | {"launch"}
    by_package = {package: [m for m in MUTANTS if m.package == package] for package in packages}
    assert {package for package, mutants in by_package.items() if len(mutants) < 2} == set()
    assert TEST_FOLDERS.keys() == packages
    assert all(mutant.fault.endswith(".") for mutant in MUTANTS)


def test_the_test_folders_exist():
    for package, folders in TEST_FOLDERS.items():
        assert 1 <= len(folders) <= 3, package
        assert all((ROOT / folder).is_dir() for folder in folders), package
    for mutant in MUTANTS:
        assert set(TEST_FOLDERS[mutant.package]) <= set(select_tests(mutant))
        assert all((ROOT / test).exists() for test in select_tests(mutant)), mutant.name


def test_a_fault_changes_only_its_function():
    source = source_of(EXAMPLE)
    assert EXAMPLE.mutate(source) == source.replace("number % candidate == 0", "number % candidate")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": "absent"}, "occurs 0 times"),
        ({"text": "candidate"}, "occurs 3 times"),
        ({"function": "sas_megatron.config.section:absent"}, "is defined 0 times"),
        ({"replacement": "number % )"}, "does not compile"),
        ({"replacement": "(number % candidate) == 0"}, "the same program"),
        (
            {
                "function": "launch/cluster_variables.sh",
                "text": "print_usage() {",
                "replacement": "print_usage(",
            },
            "not a valid script",
        ),
    ],
)
def test_a_fault_that_does_not_apply_is_an_error(changed, message):
    mutant = dataclasses.replace(EXAMPLE, **changed)
    with pytest.raises(NotApplicable, match=message):
        mutant.mutate(source_of(mutant))


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "3 passed", ("survived", None)),
        (None, "", ("timed out", None)),
        (
            1,
            "FAILED tests/a/test_b.py::test_c[x - y] - assert 1",
            ("caught", "tests/a/test_b.py::test_c[x - y]"),
        ),
        (
            1,
            "FAILED tests/a/test_b.py::test_c[1] - assert [1] == [2]",
            ("caught", "tests/a/test_b.py::test_c[1]"),
        ),
        (1, "ERROR tests/a/test_b.py::test_c", ("caught", "tests/a/test_b.py::test_c")),
        (2, "ERROR tests/a/test_b.py - ImportError", ("broken", "tests/a/test_b.py")),
        (4, "ImportError while loading conftest", ("broken", None)),
        (5, "no tests ran", ("not measured", None)),
    ],
)
def test_the_outcome_is_derived_from_the_status_and_summary_of_pytest(status, output, expected):
    assert judge(status, output) == expected


def test_results_of_another_commit_or_selection_are_ignored(tmp_path):
    result = Result("a", "config", "A fault.", "caught", "tests/x.py::test[a|b]", 1.0, "1234", "default")
    path = tmp_path / "results.jsonl"
    for other in (result, dataclasses.replace(result, name="b", commit="5678")):
        append_result(path, other)
    path.write_text(path.read_text() + '{"name": "cut sh')
    found = read_results(path, commit="1234", selection="default")
    assert found == {"a": result}
    assert read_results(path, commit="1234", selection="all") == {}
    assert r"`tests/x.py::test[a\|b]`" in format_table(found.values())
    assert summarize([result, dataclasses.replace(result, outcome="survived")]) == "1 of 2 faults caught"
