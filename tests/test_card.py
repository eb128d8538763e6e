"""The model card says what the directory is and gives commands that are right for its length."""

from conftest import random_model

from engine.plan import Stage
from hub.card import model_card


def test_the_card_states_recipe_scores_and_commands():
    teacher = random_model().config
    student = teacher.extended("linear", 8)
    plan = [
        Stage("stage1", "relation", 64, 4, 10, 0.002),
        Stage("stage2", "next token", 512, 1, 5, 0.0005),
    ]
    text = model_card(
        teacher,
        student,
        "tiny",
        plan,
        "| a | table |",
        {"scale": 8.0, "rope": "linear", "lr1": None},
    )
    assert text.startswith("---\nlibrary_name: transformers\n")
    for said in (
        "tiny, extended to 512 tokens",
        "linear RoPE, factor 8",
        "10 x 4 x 64",
        "| a | table |",
    ):
        assert said in text
    assert "--max-model-len 512" in text and "max_length=512" in text and "-c 512" in text
    assert "scale 8.0, rope linear" in text and "lr1" not in text
