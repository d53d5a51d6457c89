"""Ontologies with known answers, and files that are none."""

import json

import pytest

from engine.taggers.ontology import Ontology, read_ontology

AUDIOSET = [
    {"id": "/m/1", "name": "Animal", "child_ids": ["/m/2", "/m/4"]},
    {"id": "/m/2", "name": "Dog", "child_ids": ["/m/3"]},
    {"id": "/m/3", "name": "Bark", "child_ids": []},
    {"id": "/m/4", "name": "Cat", "child_ids": []},
]


def test_labels_that_another_is_a_kind_of_are_left_out():
    ontology = Ontology({"bark": ["dog"], "dog": ["animal", "pet"], "cat": ["animal", "pet"]})
    assert ontology.above("Bark") == {"dog", "animal", "pet"}
    assert ontology.lowest(["Animal", "bark", "rain"]) == ["bark", "rain"]  # the dog between them is not needed
    assert ontology.lowest(["dog", "cat", "pet"]) == ["dog", "cat"]
    assert ontology.lowest(["pet"]) == ["pet"] and ontology.lowest([]) == []


def test_audiosets_file_and_a_mapping_are_read(tmp_path):
    (tmp_path / "ontology.json").write_text(json.dumps(AUDIOSET))
    (tmp_path / "own.yaml").write_text("Bark: [Dog]\nDog: Animal\nCat: [Animal]\n")
    (tmp_path / "own.json").write_text('{"Bark": ["Dog"], "Dog": ["Animal"], "Cat": ["Animal"]}')
    for name in ("ontology.json", "own.yaml", "own.json"):
        ontology = read_ontology(tmp_path / name)
        assert ontology.labels == {"animal", "dog", "bark", "cat"}
        assert ontology.lowest(["Animal", "Dog", "Bark", "Cat"]) == ["Bark", "Cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "dog: [bark]\nbark: [dog]\n", "an ontology must have no loop, got .*dog.*bark.*; remove"),
        ("a.yaml", "dog: [Dog]\n", "an ontology must have no loop, got dog > dog"),
        ("a.json", "{bark", "cannot read .*a.json as an ontology .*; write it like"),
        ("a.yaml", "- dog\n", r"a.yaml must be a mapping of labels|cannot read .*a.yaml as an ontology"),
        ("a.yaml", "dog: [1]\n", r"must have a list of labels, got \[1\] for 'dog'; write"),
        ("a.json", '[{"id": "x", "name": "Dog"}]', "an entry lacks 'child_ids'"),
        ("a.json", '[{"id": "x", "name": "Dog", "child_ids": ["y"]}]', "an entry lacks 'y'"),
        ("a.json", "7", "must be a mapping of labels, got a int"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ontology(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no ontology .*gone.json; give"):
        read_ontology(tmp_path / "gone.json")
