"""Checkpoints damaged at random: each reader refuses one in a sentence that names the file or field, or gives what it
gives for the sound checkpoint. What verifying calls sound is what loading gives, and inspecting agrees with loading."""

import pytest
from damaged_bases import make_bases
from judging import Judge, figures


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tokenizer):
    scratch = tmp_path_factory.mktemp("damage")
    return Judge(make_bases(scratch / "bases", tokenizer), scratch)


def cases_of(judge, seeds):
    cases = [judge.case(seed) for seed in seeds]
    faults = [str(case) for case in cases if case.faults]
    assert not faults, "\n".join([*faults, figures(cases)])
    return cases


# Damages of one kind have neighbouring seeds nowhere, so every part of them meets all kinds.
@pytest.mark.parametrize("first", range(0, 300, 30))
def test_damage_is_named_or_changes_nothing(judge, first):
    cases_of(judge, range(first, first + 30))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(300, 2300, 100))
def test_much_damage_is_named_or_changes_nothing(judge, first, capsys):
    cases = cases_of(judge, range(first, first + 100))
    with capsys.disabled():
        print(f"\n{figures(cases)}")
