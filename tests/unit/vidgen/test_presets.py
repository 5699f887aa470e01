"""Each preset has its sentence, and the subject is asked to stay the same where it is moved."""

from __future__ import annotations

import itertools
import typing

import pytest

from vidgen import contracts, presets
from vidgen.contracts import EditParams


@pytest.mark.parametrize(
    ("literal", "sentences"),
    [
        (contracts.Background, presets.BACKGROUNDS),
        (contracts.Style, presets.STYLES),
        (contracts.Viewpoint, presets.VIEWPOINTS),
    ],
)
def test_every_preset_has_a_sentence_of_its_own(literal: object, sentences: dict[str, str]) -> None:
    assert set(sentences) == set(typing.get_args(literal))
    assert len(set(sentences.values())) == len(sentences)
    for sentence in sentences.values():
        assert sentence[0].isupper()
        assert sentence.endswith(".")


def test_without_presets_the_prompt_is_the_users_word_for_word() -> None:
    assert presets.compose(EditParams(prompt="make it rain")) == "make it rain"


def test_a_style_is_added_without_the_identity_sentence() -> None:
    composed = presets.compose(EditParams(prompt="make it rain", style="sepia"))
    assert composed == f"make it rain. {presets.STYLES['sepia']}"


@pytest.mark.parametrize("fields", [{"background": "beach"}, {"viewpoint": "left"}])
def test_the_subject_is_kept_where_background_or_viewpoint_change(fields: dict[str, str]) -> None:
    composed = presets.compose(EditParams.model_validate({"prompt": "Walk!", **fields}))
    assert composed.startswith("Walk! ")
    assert composed.endswith(presets.IDENTITY)


def test_all_presets_together_come_in_one_order() -> None:
    edit = EditParams(prompt="a red hat", background="city", viewpoint="wide", style="neon")
    parts = [presets.BACKGROUNDS["city"], presets.VIEWPOINTS["wide"], presets.STYLES["neon"], presets.IDENTITY]
    composed = presets.compose(edit)
    places = [composed.index(part) for part in ("a red hat.", *parts)]
    assert all(one < other for one, other in itertools.pairwise(places))
