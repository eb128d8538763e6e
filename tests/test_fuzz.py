"""What fuzz.py promises, over the first 1,000 cases of one seed; tests/fuzz.py runs it longer."""

from fuzz import CASES, fuzz


def test_a_thousand_broken_inputs_end_in_a_sentence_or_in_the_right_thing():
    ends, faults = fuzz(cases=1000, seed=0)
    assert not faults, "\n".join(faults)
    for kind in CASES:
        for end in ("refused", "accepted"):
            assert ends[f"{kind} {end}"], f"{kind} was never {end}: that shows nothing"
    assert ends["compared with transformers"] >= 3
