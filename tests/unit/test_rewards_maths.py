"""The maths reward: answers in the forms of GSM8K and MATH, and what earns nothing."""

import pytest

from megatron_tower.config import InputError
from megatron_tower.rewards import maths

# fmt: off
EQUAL = [
    ("#### 1,234", "1234"), ("She sells 2 * 9 = $18.\n#### 18", "18"), ("1,234", "So it is 1,234 dollars."), ("42", "#### 42"),
    (42, "42"), ("42", r"\boxed{42}"), ("42", r"Hence \(\boxed{42}\)"), ("42", "The answer is 42."), ("42", "The answer is: **42**"),
    ("42", "Answer: 42.0"), ("42", "The answer is $42.00."), ("42", "the final answer is: $42$"),
    ("42", "My answer is that he has 42 apples"), ("6", "The answer is: 6 cm"), ("42", "1 2 3, in the end 42"), ("70000", "#### $70,000"),
    ("18", r"\boxed{\$18}"), ("1,234", r"\boxed{1,234 \text{ dollars}}"), ("18", "First 20, then \\boxed{18} of 25"),
    ("2", "The answer is 2.\nBut 3 is also a number."), ("-5", "The answer is -5"), ("3.14", "Answer: 3.14"), (r"\frac{1}{2}", "0.5"),
    (r"so $\boxed{\frac{1}{2}}$.", "The answer is 1/2"), (r"\frac12", r"The answer is $\dfrac{1}{2}$."), ("1/2", "50/100"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"thus $\boxed{\frac{\sqrt3}{2}}$."), ("x^2+2x+1", "$(x+1)^2$"), ("x+1", "The answer is x+1"),
    (r"(3, \frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}"), (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"), ("[0,1)", r"\boxed{[0,1)}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"), (r"\text{east}", "The answer is east."), (r"10\%", "10%"), ("10", r"\boxed{10\%}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}"), ("x=2", "2"),
    ("1/3", r"\boxed{\frac{2}{6}}"),
]
DIFFERENT = [
    ("42", ""), ("42", " \n"), ("42", "43"), ("42", "-42"), ("42", "nothing"), ("42", r"\boxed{42} or rather \boxed{43}"),
    ("42", r"\boxed{42"), ("42", "42, so the answer is 41"), ("42", "#### 41\n42"), ("42", "The answer is 41 or 42"),
    ("42", r"\boxed{41, 42}"), ("1/3", "0.3333"), ("42", "0" * 10_000), (r"\text{Evelyn}", r"\boxed{\text{Carla}}"),
    ("[0,1)", r"\boxed{[0,1]}"), ("1234", "1,23"), ("x+1", "The answer is x-1"), ("(1,2)", r"\boxed{(2,1)}"), ("42", "42" * 3000),
    ("5", r"\boxed{\boxed{}}"), ("10", "9.99"),
]
MALFORMED = [None, {}, {"answer": None}, {"answer": " "}, {"answer": True}, {"answer": ["42"]}, "42"]
# fmt: on


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_answers_score_one(reference: str | int, answer: str) -> None:
    assert maths.score({"check": {"answer": reference}}, answer) == 1.0


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_other_answers_score_nothing(reference: str, answer: str) -> None:
    assert maths.score({"check": {"answer": reference}}, answer) == 0.0


@pytest.mark.parametrize("check", MALFORMED)
def test_an_item_without_a_reference_is_refused(check: object) -> None:
    with pytest.raises(InputError, match="a maths item needs check"):
        maths.score({"check": check}, "42")


def test_no_signal_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify's time-outs would fail outside the main thread, and the pool kills anyway."""
    import signal

    monkeypatch.setattr(signal, "alarm", None)
    assert maths.score({"check": {"answer": "42"}}, r"\boxed{6 \cdot 7}") == 1.0
